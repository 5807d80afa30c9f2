//! Every kernel compiles for every architecture that is served, on a machine without a GPU too.

use dinolab_core::cuda;
use dinolab_plugins as _;

#[test]
fn every_kernel_compiles_for_ampere_hopper_and_blackwell() {
    let [_, nvrtc, _] = cuda::libraries();
    if nvrtc.version.is_none() {
        println!("skipped: NVRTC is not on LD_LIBRARY_PATH; {}", nvrtc.remedy);
        return;
    }
    let names: Vec<&str> = cuda::sources().iter().map(|s| s.name).collect();
    for plugin_or_op in ["augment", "elementwise", "layer_norm", "rope_box"] {
        assert!(names.contains(&plugin_or_op), "{plugin_or_op} is not registered: {names:?}");
    }
    for arch in ["sm_80", "sm_90a", "sm_100a"] {
        let compiled = cuda::compile(&cuda::sources(), arch).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(compiled.len(), names.len(), "{arch}");
        for source in compiled {
            assert!(!source.log.contains("warning"), "{} for {arch}:\n{}", source.name, source.log);
        }
    }
}
