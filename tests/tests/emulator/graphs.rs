//! Recording a stream into a graph, and what may not be done meanwhile.

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode, CUstreamCaptureStatus};
use cudarc::driver::{CudaFunction, CudaSlice, DevicePtr, PushKernelArg};
use dinolab_tests::gpu_test;

use super::{blocks, launch, Gpu};

const ADD: &str = r#"extern "C" __global__ void add(float* x, const float* y, float factor) {
    x[threadIdx.x] += factor * y[threadIdx.x];
}"#;

const MODE: CUstreamCaptureMode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
const FLAGS: CUgraphInstantiate_flags = CUgraphInstantiate_flags(0);

fn adder(gpu: &Gpu) -> CudaFunction {
    gpu.kernel(ADD, "add")
}

gpu_test!(a_graph_repeats_its_work_on_the_data_of_the_day, {
    let gpu = Gpu::new();
    let add = adder(&gpu);
    let (mut x, mut y, mut z) = (gpu.upload(&[1f32; 8]), gpu.upload(&[1f32; 8]), gpu.upload(&[5f32; 8]));
    gpu.stream.synchronize().expect("a wait");
    gpu.stream.begin_capture(MODE).expect("a capture");
    {
        // The argument is copied when the launch is recorded.
        let factor = 2f32;
        launch(gpu.stream.launch_builder(&add).arg(&mut x).arg(&y).arg(&factor), blocks(1, 8)).expect("a launch");
    }
    gpu.stream.memset_zeros(&mut z).expect("a fill");
    gpu.stream.memcpy_dtod(&x, &mut z).expect("a copy");
    let graph = gpu.stream.end_capture(FLAGS).expect("an end").expect("a graph");
    assert_eq!(gpu.download(&x), [1.0; 8], "recording runs nothing");
    graph.launch().expect("a launch");
    gpu.stream.memcpy_htod(&[10f32; 8], &mut y).expect("a copy");
    graph.launch().expect("a launch");
    assert_eq!(gpu.download(&x), [1.0 + 2.0 + 20.0; 8]);
    assert_eq!(gpu.download(&z), [23.0; 8]);
});

gpu_test!(what_waits_or_allocates_ends_a_capture, {
    let gpu = Gpu::new();
    let x = gpu.upload(&[1f32; 8]);
    gpu.stream.synchronize().expect("a wait");
    let forbidden: [(&str, &dyn Fn() -> CUresult); 3] = [
        ("synchronize", &|| gpu.stream.synchronize().expect_err("not while recording").0),
        // SAFETY: nothing is allocated.
        ("allocate", &|| unsafe { cudarc::driver::result::malloc_sync(64) }.expect_err("not while recording").0),
        ("read back", &|| {
            let mut host = [0f32; 8];
            let (address, _guard) = x.device_ptr(&gpu.stream);
            // SAFETY: the memory is alive.
            unsafe { cudarc::driver::result::memcpy_dtoh_sync(&mut host, address) }.expect_err("not while recording").0
        }),
    ];
    for (name, call) in forbidden {
        gpu.stream.begin_capture(MODE).expect("a capture");
        assert_eq!(call(), CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "{name}");
        let status = gpu.stream.capture_status().expect("a status");
        assert_eq!(status, CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED, "{name}");
        let ended = gpu.stream.end_capture(FLAGS).err().expect("no graph");
        assert_eq!(ended.0, CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "{name}");
    }
    assert_eq!(gpu.download(&x), [1.0; 8], "the stream works again");
});

gpu_test!(a_second_stream_joins_a_capture_through_events, {
    let gpu = Gpu::new();
    let add = adder(&gpu);
    let side = gpu.context.new_stream().expect("a stream");
    let (mut x, y, factor) = (gpu.upload(&[1f32; 8]), gpu.upload(&[1f32; 8]), 1f32);
    gpu.stream.synchronize().expect("a wait");
    let record = |joined: bool, x: &mut CudaSlice<f32>| {
        gpu.stream.begin_capture(MODE).expect("a capture");
        side.wait(&gpu.stream.record_event(None).expect("an event")).expect("a fork");
        launch(side.launch_builder(&add).arg(x).arg(&y).arg(&factor), blocks(1, 8)).expect("a launch");
        if joined {
            gpu.stream.wait(&side.record_event(None).expect("an event")).expect("a join");
        }
        gpu.stream.end_capture(FLAGS)
    };
    let unjoined = record(false, &mut x).err().expect("no graph");
    assert_eq!(unjoined.0, CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
    let graph = record(true, &mut x).expect("an end").expect("a graph");
    graph.launch().expect("a launch");
    assert_eq!(gpu.download(&x), [2.0; 8]);
});

gpu_test!(a_capture_waits_for_no_event_from_before, {
    let gpu = Gpu::new();
    let before = gpu.context.new_stream().expect("a stream").record_event(None).expect("an event");
    gpu.stream.begin_capture(MODE).expect("a capture");
    let isolated = gpu.stream.wait(&before).expect_err("it is not part of the capture");
    assert_eq!(isolated.0, CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    assert!(gpu.stream.end_capture(FLAGS).is_err());
});
