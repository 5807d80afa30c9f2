//! Kernels: threads, barriers, shuffles, votes, atomics, tensor cores, asynchronous copies, shared memory.

use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use cudarc::driver::{LaunchConfig, PushKernelArg};
use dinolab_tests::gpu_test;
use half::bf16;

use super::{blocks, launch, Gpu};

gpu_test!(vectors_are_added, {
    let gpu = Gpu::new();
    let add = gpu.kernel(
        r#"extern "C" __global__ void add(const float* a, const float* b, float* c, int n) {
            int i = blockIdx.x * blockDim.x + threadIdx.x;
            if (i < n) c[i] = a[i] + b[i];
        }"#,
        "add",
    );
    let n = 1000;
    let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
    let (x, y) = (gpu.upload(&a), gpu.upload(&a));
    let mut z = gpu.upload(&vec![0f32; 1000]);
    launch(gpu.stream.launch_builder(&add).arg(&x).arg(&y).arg(&mut z).arg(&n), blocks(4, 256)).expect("a launch");
    assert_eq!(gpu.download(&z), a.iter().map(|v| 2.0 * v).collect::<Vec<_>>());
});

gpu_test!(a_block_sums_with_shuffles_and_barriers, {
    let gpu = Gpu::new();
    let sum = gpu.kernel(
        r#"extern "C" __global__ void sum(const float* x, float* y, int n) {
            float s = 0.0f;
            for (int i = threadIdx.x; i < n; i += blockDim.x) s += x[blockIdx.x * n + i];
            s = block_sum(s);
            if (threadIdx.x == 0) y[blockIdx.x] = s;
        }"#,
        "sum",
    );
    let (rows, n) = (5, 777);
    let x: Vec<f32> = (0..rows * n).map(|i| (i % 13) as f32).collect();
    let (input, mut output, count) = (gpu.upload(&x), gpu.upload(&vec![0f32; rows]), n as i32);
    let shape = blocks(rows as u32, 256);
    launch(gpu.stream.launch_builder(&sum).arg(&input).arg(&mut output).arg(&count), shape).expect("a launch");
    assert_eq!(gpu.download(&output), x.chunks(n).map(|row| row.iter().sum()).collect::<Vec<f32>>());
});

gpu_test!(shuffles_and_votes_move_values_between_lanes, {
    let gpu = Gpu::new();
    let kernel = gpu.kernel(
        r#"extern "C" __global__ void lanes(int* y) {
            const int lane = threadIdx.x, value = 100 + lane;
            const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
            y[lane] = __shfl_sync(~0u, value, 5 * lane % 32);
            y[32 + lane] = __shfl_sync(~0u, value, 3, 8);
            y[64 + lane] = __shfl_up_sync(~0u, value, 3, 16);
            y[96 + lane] = __shfl_down_sync(~0u, value, 5);
            y[128 + lane] = __shfl_xor_sync(~0u, value, 6);
            y[160 + lane] = (int)__ballot_sync(~0u, lane % 3 == 0);
            y[192 + lane] = __any_sync(half, lane == 20) * 2 + __all_sync(half, lane < 16);
            if (lane < 16) y[224 + lane] = __shfl_sync(0xffffu, value, 2);
            else y[224 + lane] = __shfl_sync(0xffff0000u, value, 30);
        }"#,
        "lanes",
    );
    let mut y = gpu.upload(&vec![0i32; 256]);
    launch(gpu.stream.launch_builder(&kernel).arg(&mut y), blocks(1, 32)).expect("a launch");
    let thirds = (0..32).step_by(3).fold(0u32, |bits, lane| bits | 1 << lane) as i32;
    let expected = |row: i32, lane: i32| match row {
        0 => 100 + 5 * lane % 32,
        1 => 100 + lane / 8 * 8 + 3,
        2 => 100 + if lane % 16 < 3 { lane } else { lane - 3 },
        3 => 100 + if lane + 5 < 32 { lane + 5 } else { lane },
        4 => 100 + (lane ^ 6),
        5 => thirds,
        6 => 1 + i32::from(lane >= 16),
        _ => 100 + if lane < 16 { 2 } else { 30 },
    };
    let y = gpu.download(&y);
    for (i, value) in y.into_iter().enumerate() {
        let (row, lane) = (i as i32 / 32, i as i32 % 32);
        assert_eq!(value, expected(row, lane), "row {row}, lane {lane}");
    }
});

gpu_test!(threads_that_returned_are_not_waited_for, {
    let gpu = Gpu::new();
    let kernel = gpu.kernel(
        r#"extern "C" __global__ void early(int* y) {
            __shared__ int seen[128];
            if (threadIdx.x >= 70) return;
            seen[threadIdx.x] = threadIdx.x;
            __syncthreads();
            y[threadIdx.x] = seen[69 - threadIdx.x];
        }"#,
        "early",
    );
    let mut y = gpu.upload(&[0i32; 70]);
    launch(gpu.stream.launch_builder(&kernel).arg(&mut y), blocks(1, 128)).expect("a launch");
    assert_eq!(gpu.download(&y), (0..70).rev().collect::<Vec<_>>());
});

gpu_test!(atomics_of_all_blocks_add_up, {
    let gpu = Gpu::new();
    let kernel = gpu.kernel(
        r#"extern "C" __global__ void count(int* y, unsigned long long* sum) {
            atomicAdd(&y[0], 1);
            atomicMax(&y[1], (int)(blockIdx.x * blockDim.x + threadIdx.x));
            atomicMin(&y[2], -(int)blockIdx.x);
            atomicAdd(sum, 1ull << 33);
        }"#,
        "count",
    );
    let (mut y, mut sum) = (gpu.upload(&[0i32; 3]), gpu.upload(&[0u64]));
    launch(gpu.stream.launch_builder(&kernel).arg(&mut y).arg(&mut sum), blocks(100, 64)).expect("a launch");
    assert_eq!((gpu.download(&y), gpu.download(&sum)), (vec![6400, 6399, -99], vec![6400 << 33]));
});

/// 16x16 by 16x8, with the fragments of `a` loaded by ldmatrix and those of `b` by ldmatrix.trans, and once more with all
/// of them made by hand as the PTX manual has it.
const MMA: &str = r#"
extern "C" __global__ void mma(const bf16* a, const bf16* b, float* by_ldmatrix, float* by_hand) {
    __shared__ __align__(16) bf16 as[16][16], bs[16][16];
    const int lane = threadIdx.x, group = lane / 4, member = lane % 4;
    for (int i = lane; i < 256; i += 32) as[i / 16][i % 16] = a[i];
    for (int i = lane; i < 256; i += 32) bs[i / 16][i % 16] = i % 16 < 8 ? b[i / 16 * 8 + i % 16] : from_float<bf16>(0.0f);
    __syncthreads();
    u32 fa[4], fb[4];
    float d[4], zero[4] = {0, 0, 0, 0};
    ldmatrix_x4(fa, &as[lane % 16][lane / 16 * 8]);
    ldmatrix_x4_trans(fb, &bs[lane % 16][lane / 16 * 8]);
    mma_bf16(d, fa, fb, zero);
    for (int i = 0; i < 4; i++) by_ldmatrix[(group + i / 2 * 8) * 8 + member * 2 + i % 2] = d[i];
    for (int i = 0; i < 4; i++) {
        const int row = group + i % 2 * 8, k = i / 2 * 8 + member * 2;
        fa[i] = as[row][k].bits | (u32)as[row][k + 1].bits << 16;
    }
    for (int i = 0; i < 2; i++) {
        const int k = i * 8 + member * 2;
        fb[i] = bs[k][group].bits | (u32)bs[k + 1][group].bits << 16;
    }
    mma_bf16(d, fa, fb, d);
    for (int i = 0; i < 4; i++) by_hand[(group + i / 2 * 8) * 8 + member * 2 + i % 2] = d[i];
}"#;

gpu_test!(tensor_cores_multiply_tiles, {
    let gpu = Gpu::new();
    let kernel = gpu.kernel(MMA, "mma");
    let a: Vec<bf16> = (0..256).map(|i| bf16::from_f32((i * 7 % 19 - 9) as f32 / 4.0)).collect();
    let b: Vec<bf16> = (0..128).map(|i| bf16::from_f32((i * 5 % 23 - 11) as f32 / 8.0)).collect();
    let (x, y) = (gpu.upload(&a), gpu.upload(&b));
    let (mut once, mut twice) = (gpu.upload(&[0f32; 128]), gpu.upload(&[0f32; 128]));
    let mut arguments = gpu.stream.launch_builder(&kernel);
    launch(arguments.arg(&x).arg(&y).arg(&mut once).arg(&mut twice), blocks(1, 32)).expect("a launch");
    let product = |i: usize| (0..16).map(|k| a[i / 8 * 16 + k].to_f32() * b[k * 8 + i % 8].to_f32()).sum::<f32>();
    let expected: Vec<f32> = (0..128).map(product).collect();
    assert_eq!(gpu.download(&once), expected);
    assert_eq!(gpu.download(&twice), expected.iter().map(|v| 2.0 * v).collect::<Vec<_>>());
});

gpu_test!(tf32_tensor_cores_drop_thirteen_bits, {
    let gpu = Gpu::new();
    let kernel = gpu.kernel(
        r#"extern "C" __global__ void mma(const float* a, const float* b, float* d) {
            const int lane = threadIdx.x, group = lane / 4, member = lane % 4;
            u32 fa[4], fb[2];
            float f[4] = {0, 0, 0, 0};
            for (int i = 0; i < 4; i++) fa[i] = __float_as_uint(a[(group + i % 2 * 8) * 8 + member + i / 2 * 4]);
            for (int i = 0; i < 2; i++) fb[i] = __float_as_uint(b[(member + i * 4) * 8 + group]);
        #ifdef DINOLAB_EMULATED
            emu_mma_m16n8k8_tf32(f, fa, fb, f);
        #else
            asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                : "+f"(f[0]), "+f"(f[1]), "+f"(f[2]), "+f"(f[3])
                : "r"(fa[0]), "r"(fa[1]), "r"(fa[2]), "r"(fa[3]), "r"(fb[0]), "r"(fb[1]));
        #endif
            for (int i = 0; i < 4; i++) d[(group + i / 2 * 8) * 8 + member * 2 + i % 2] = f[i];
        }"#,
        "mma",
    );
    // The lowest bits of `a` are lost; what is left gives whole numbers.
    let a: Vec<f32> = (0..128).map(|i| (i * 7 % 19 + 1) as f32 * (1.0 + f32::EPSILON)).collect();
    let b: Vec<f32> = (0..64).map(|i| (i * 5 % 23 - 11) as f32).collect();
    let (x, y, mut d) = (gpu.upload(&a), gpu.upload(&b), gpu.upload(&[0f32; 128]));
    launch(gpu.stream.launch_builder(&kernel).arg(&x).arg(&y).arg(&mut d), blocks(1, 32)).expect("a launch");
    let product = |i: usize| (0..8).map(|k| a[i / 8 * 8 + k].round() * b[k * 8 + i % 8]).sum::<f32>();
    assert_eq!(gpu.download(&d), (0..128).map(product).collect::<Vec<_>>());
});

gpu_test!(asynchronous_copies_arrive_when_waited_for, {
    let gpu = Gpu::new();
    let kernel = gpu.kernel(
        r#"extern "C" __global__ void copies(const float* x, float* y, int stages) {
            __shared__ __align__(16) float stage[2][128];
            const int at = threadIdx.x * 4;
            copy_async16(&stage[0][at], x + at, 16);
            copy_commit();
            for (int s = 0; s < stages; s++) {
                // The last stage has half of its columns.
                if (s + 1 < stages) copy_async16(&stage[(s + 1) % 2][at], x + (s + 1) * 128 + at, s + 2 == stages ? 8 : 16);
                copy_commit();
                copy_wait<1>();
                __syncthreads();
                y[s * 32 + threadIdx.x] = stage[s % 2][127 - at] + stage[s % 2][at];
                __syncthreads();
            }
        }"#,
        "copies",
    );
    let stages = 5i32;
    let x: Vec<f32> = (0..stages * 128).map(|i| i as f32).collect();
    let (input, mut output) = (gpu.upload(&x), gpu.upload(&vec![0f32; 32 * stages as usize]));
    launch(gpu.stream.launch_builder(&kernel).arg(&input).arg(&mut output).arg(&stages), blocks(1, 32))
        .expect("a launch");
    let value = |s: usize, i: usize| if s == 4 && i % 4 >= 2 { 0.0 } else { x[s * 128 + i] };
    let expected = (0..160).map(|i| value(i / 32, 127 - i % 32 * 4) + value(i / 32, i % 32 * 4));
    assert_eq!(gpu.download(&output), expected.collect::<Vec<_>>());
});

gpu_test!(shared_memory_beyond_48_kib_is_opted_in, {
    let gpu = Gpu::new();
    let kernel = gpu.kernel(
        r#"extern "C" __global__ void reverse(float* x, int n) {
            DYNAMIC_SHARED(float, all);
            for (int i = threadIdx.x; i < n; i += blockDim.x) all[i] = x[i];
            __syncthreads();
            for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] = all[n - 1 - i];
        }"#,
        "reverse",
    );
    let n = 20_000;
    let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
    let mut memory = gpu.upload(&x);
    let shape = LaunchConfig { shared_mem_bytes: 4 * n as u32, ..blocks(1, 512) };
    let refused = launch(gpu.stream.launch_builder(&kernel).arg(&mut memory).arg(&n), shape);
    assert!(refused.is_err(), "a block has 48 KiB unless more is asked for");
    kernel.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 4 * n).expect("80 KiB");
    launch(gpu.stream.launch_builder(&kernel).arg(&mut memory).arg(&n), shape).expect("a launch");
    assert_eq!(gpu.download(&memory), x.into_iter().rev().collect::<Vec<_>>());
});

gpu_test!(impossible_launches_are_refused, {
    let gpu = Gpu::new();
    let kernel = gpu.kernel(
        r#"extern "C" __global__ void __launch_bounds__(128) bound() {}
           extern "C" __global__ void unbound() {}"#,
        "bound",
    );
    for shape in [blocks(1, 256), blocks(1, 2048), blocks(1, 0), blocks(0, 32)] {
        assert!(launch(&mut gpu.stream.launch_builder(&kernel), shape).is_err(), "{shape:?}");
    }
    launch(&mut gpu.stream.launch_builder(&kernel), blocks(1, 128)).expect("a launch");
});
