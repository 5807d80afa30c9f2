//! Kernel sources, compiled at run time by NVRTC and kept on disk as machine code.

use std::cmp::Reverse;
use std::ffi::CString;
use std::path::PathBuf;
use std::sync::OnceLock;

use cudarc::nvrtc::{result as nvrtc, sys};

use crate::{Error, Result};

/// What every source is compiled behind.
const COMMON: &str = include_str!("common.cuh");

/// CUDA C++ that is compiled as one module, behind the common header (element types, reductions, tensor cores).
#[derive(Debug)]
pub struct Source {
    /// Its name in messages and in the cache.
    pub name: &'static str,
    /// The code, in parts.
    pub code: &'static [&'static str],
    /// Whether it is one variant of several, of which a model needs few: compiled for who asks for it, not beforehand.
    pub variant: bool,
}

/// A registered source: every source of every linked crate can be found, so that all are compiled before they are
/// needed, and checked.
#[derive(Clone, Copy, Debug)]
pub struct SourceRef(pub &'static Source);

inventory::collect!(SourceRef);

/// Defines and registers a [`Source`](crate::cuda::Source):
/// `cuda_source! { static LAYER_NORM = "layer_norm" { include_str!("layer_norm.cu") } }`. One that is a
/// [variant](crate::cuda::Source::variant) is a `variant static`.
#[macro_export]
macro_rules! cuda_source {
    (variant static $name:ident = $text:literal { $($code:expr),+ $(,)? }) => {
        $crate::cuda_source! { @ [] $name $text true $($code),+ }
    };
    ($visible:vis static $name:ident = $text:literal { $($code:expr),+ $(,)? }) => {
        $crate::cuda_source! { @ [$visible] $name $text false $($code),+ }
    };
    (@ [$($visible:tt)*] $name:ident $text:literal $variant:literal $($code:expr),+) => {
        $($visible)* static $name: $crate::cuda::Source =
            $crate::cuda::Source { name: $text, code: &[$($code),+], variant: $variant };
        $crate::inventory::submit! { $crate::cuda::SourceRef(&$name) }
    };
}

/// All registered sources, by name.
pub fn sources() -> Vec<&'static Source> {
    let mut all: Vec<_> = inventory::iter::<SourceRef>.into_iter().map(|s| s.0).collect();
    all.sort_by_key(|s| s.name);
    all
}

/// A source's machine code.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The source's name.
    pub name: &'static str,
    /// Whether it was found on disk.
    pub cached: bool,
    /// What the compiler said.
    pub log: String,
    /// Machine code, or PTX for a device that NVRTC does not know.
    pub(super) cubin: Vec<u8>,
}

/// Compiles sources for an architecture (`sm_90a`), in parallel, those first that take longest. Needs NVRTC, but no GPU.
///
/// # Errors
/// If NVRTC is missing, or a source does not compile.
pub fn compile(sources: &[&'static Source], arch: &str) -> Result<Vec<Compiled>> {
    let version = version()?;
    let mut order: Vec<_> = sources.iter().map(|&source| (source, OnceLock::new())).collect();
    // Long ones take long.
    order.sort_by_key(|(source, _)| Reverse(source.code.iter().map(|code| code.len()).sum::<usize>()));
    rayon::scope_fifo(|scope| {
        for (source, done) in &order {
            scope.spawn_fifo(move |_| done.set(source.compile(arch, version)).expect("set once"));
        }
    });
    order.into_iter().map(|(_, done)| done.into_inner().expect("set above")).collect()
}

/// What to compile for on a device of this capability.
pub(super) fn architecture((major, minor): (i32, i32)) -> Result<String> {
    let broken = |e: nvrtc::NvrtcError| Error::user(format!("NVRTC does not answer: {e}"), "reinstall NVRTC");
    let mut count = 0;
    // SAFETY: an out-pointer to a local.
    unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) }.result().map_err(broken)?;
    let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: there is room for as many as it said.
    unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) }.result().map_err(broken)?;
    let own = 10 * major + minor;
    if known.contains(&own) {
        // The `a` variants have what is special to a generation; they exist from Hopper on.
        return Ok(format!("sm_{own}{}", if major >= 9 { "a" } else { "" }));
    }
    let before = known.into_iter().filter(|&arch| (80..own).contains(&arch)).max();
    before.map(|arch| format!("compute_{arch}")).ok_or_else(|| {
        let problem =
            format!("NVRTC compiles for no architecture that a device of compute capability {major}.{minor} runs");
        Error::user(problem, "install another nvidia-cuda-nvrtc, one that is as new as the device")
    })
}

/// NVRTC's version, if the library is there.
pub(super) fn version() -> Result<(i32, i32)> {
    // SAFETY: only looks for the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::user(
            "NVRTC (libnvrtc.so) was not found: kernels cannot be compiled",
            "install CUDA's NVRTC (`pip install nvidia-cuda-nvrtc`) and put its folder on LD_LIBRARY_PATH",
        ));
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: out-pointers to locals.
    let result = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    result.result().map_err(|e| Error::user(format!("NVRTC does not answer: {e:?}"), "reinstall CUDA's NVRTC"))?;
    Ok((major, minor))
}

type Size = unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult;
type Get = unsafe fn(sys::nvrtcProgram, *mut std::ffi::c_char) -> sys::nvrtcResult;

impl Source {
    fn text(&self) -> String {
        let mut text = format!("#line 1 \"common.cuh\"\n{COMMON}");
        for code in self.code {
            text += &format!("\n#line 1 \"{}.cu\"\n{code}", self.name);
        }
        text
    }

    /// How many parameters the kernel `name` has, as its text says: in `KERNEL(name, (..), (..))`, or behind its `full`
    /// name. `None` if it is declared in another way.
    pub(super) fn parameters(&self, name: &str, full: &str) -> Option<usize> {
        let lines = self.code.iter().flat_map(|code| code.lines());
        let text: String = lines.map(|line| line.split("//").next().unwrap_or(line)).collect::<Vec<_>>().join("\n");
        if let Some(at) = text.find(&format!("KERNEL({name},")) {
            // What the template is called with: parameters may hide behind a name of the preprocessor.
            let (_, rest) = list(&text[at + "KERNEL(".len()..])?;
            return list(rest).map(|(args, _)| args.len());
        }
        let declared = text.match_indices("__global__").filter_map(|(at, _)| {
            let head = &text[at..at + text[at..].find('{').unwrap_or(0)];
            let word = |c: char| c.is_alphanumeric() || c == '_';
            let place = head.match_indices(full).find(|(at, _)| {
                let behind = head[at + full.len()..].trim_start().starts_with('(');
                behind && !head[..*at].chars().next_back().is_some_and(word)
            });
            list(&head[place?.0..]).map(|(parameters, _)| parameters)
        });
        // A type and a name, or it is a name of the preprocessor.
        let plain = |list: &Vec<&str>| list.iter().all(|p| p.contains(|c: char| c.is_whitespace() || c == '*'));
        declared.filter(plain).map(|list| list.len()).next()
    }

    /// From the cache on disk, or compiled and put there.
    pub(super) fn compile(&'static self, arch: &str, version: (i32, i32)) -> Result<Compiled> {
        let text = self.text();
        let key = blake3::hash(format!("{arch} {version:?} {:?}\n{text}", options(arch)).as_bytes());
        let file = cache_folder().map(|f| f.join(format!("{}-{arch}-{}.cubin", self.name, &key.to_hex()[..24])));
        if let Some(cubin) = file.as_ref().and_then(|f| std::fs::read(f).ok()).and_then(unsealed) {
            return Ok(Compiled { name: self.name, cached: true, log: String::new(), cubin });
        }
        let (cubin, log) = self.run_compiler(&text, arch)?;
        if let Some(file) = file {
            // A cache that cannot be written only costs time.
            let _ = write_whole(&file, &sealed(&cubin));
        }
        Ok(Compiled { name: self.name, cached: false, log, cubin })
    }

    fn run_compiler(&self, text: &str, arch: &str) -> Result<(Vec<u8>, String)> {
        let text =
            CString::new(text).map_err(|_| Error::user(format!("{}: a zero byte in it", self.name), "remove it"))?;
        let broken =
            |e: nvrtc::NvrtcError| Error::user(format!("NVRTC failed on {}: {e}", self.name), "reinstall NVRTC");
        let program = nvrtc::create_program(&text, None).map_err(broken)?;
        // SAFETY: `program` is alive until it is destroyed below, once.
        unsafe {
            let compiled = nvrtc::compile_program(program, &options(arch));
            let log = nvrtc::get_program_log(program).map_err(broken)?;
            let log: Vec<u8> = log.into_iter().map(|c| c as u8).take_while(|&c| c != 0).collect();
            let log = String::from_utf8_lossy(&log).trim().to_string();
            let cubin = compiled.map_err(|_| {
                let problem = format!("{}.cu does not compile for {arch}:\n{log}", self.name);
                Error::user(problem, "mend the kernel; common.cuh says what it may use")
            });
            let cubin = cubin.and_then(|()| {
                let (size_of, get): (Size, Get) = match arch.starts_with("compute_") {
                    true => (sys::nvrtcGetPTXSize, sys::nvrtcGetPTX),
                    false => (sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN),
                };
                let mut size = 0;
                size_of(program, &mut size).result().map_err(broken)?;
                let mut cubin = vec![0u8; size];
                get(program, cubin.as_mut_ptr().cast()).result().map_err(broken)?;
                Ok(cubin)
            });
            nvrtc::destroy_program(program).map_err(broken)?;
            Ok((cubin?, log))
        }
    }
}

/// The members of the first list in parentheses, and what comes after it.
fn list(text: &str) -> Option<(Vec<&str>, &str)> {
    let text = &text[text.find('(')? + 1..];
    let (mut depth, mut start, mut members) = (0, 0, Vec::new());
    for (at, c) in text.char_indices() {
        match c {
            '(' | '<' => depth += 1,
            ')' | ',' if depth == 0 => {
                members.push(text[start..at].trim());
                start = at + 1;
                if c == ')' {
                    members.retain(|member| !member.is_empty());
                    return Some((members, &text[start..]));
                }
            }
            ')' | '>' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// No `--use_fast_math`: division and square roots stay exact; kernels name the fast functions where they want them.
/// A function without `__device__` is one all the same: before 13.1, NVRTC takes generic lambdas for functions of a host.
fn options(arch: &str) -> [String; 4] {
    [format!("--gpu-architecture={arch}"), "--std=c++17".into(), "--ptxas-options=-O3".into(), "-default-device".into()]
}

/// Where machine code and tuned choices are kept: DINOLAB_CACHE, or the user's cache folder.
pub(super) fn cache_folder() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let folder = var("DINOLAB_CACHE")
        .or_else(|| var("XDG_CACHE_HOME").map(|f| f.join("dinolab")))
        .or_else(|| var("HOME").map(|f| f.join(".cache/dinolab")))?;
    std::fs::create_dir_all(&folder).ok()?;
    Some(folder)
}

/// Machine code as the cache keeps it, with its hash in front: a damaged file is compiled anew, not run.
fn sealed(cubin: &[u8]) -> Vec<u8> {
    [blake3::hash(cubin).as_bytes(), cubin].concat()
}

/// The machine code of a file of the cache, if it is the one that was written.
fn unsealed(mut file: Vec<u8>) -> Option<Vec<u8>> {
    let cubin = file.split_off(blake3::OUT_LEN.min(file.len()));
    (blake3::hash(&cubin).as_bytes()[..] == file[..]).then_some(cubin)
}

/// Writes a file that is whole whenever it is there.
pub(super) fn write_whole(path: &std::path::Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    let folder = path.parent().expect("a file in the cache folder");
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_code_that_was_damaged_is_not_taken_from_the_cache() {
        let whole = sealed(b"code");
        assert_eq!(unsealed(whole.clone()).as_deref(), Some(&b"code"[..]));
        for i in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[i] ^= 1;
            assert_eq!(unsealed(flipped), None, "byte {i}");
            assert_eq!(unsealed(whole[..i].to_vec()), None, "cut to {i}");
        }
    }

    #[test]
    fn the_parameters_of_a_kernel_are_counted_in_its_text() {
        static SOURCE: Source = Source {
            name: "some",
            variant: false,
            code: &[
                "// extern \"C\" __global__ void two_f32(int a) {}\n\
                 extern \"C\" __global__ void __launch_bounds__(512) two_f32(float* x, Pair<int, int> n) { other_f32(x); }\n\
                 KERNEL(three, (T* x, const float* y,  // of rows\n int n), (x, y, n))\n\
                 KERNEL(hidden, (PARAMS), (a, b))\n",
                "extern \"C\" __global__ void nothing() {} extern \"C\" __global__ void unknown_f32(PARAMS) { }",
            ],
        };
        let of = |name, full| SOURCE.parameters(name, full);
        assert_eq!(of("two", "two_f32"), Some(2));
        assert_eq!(of("three", "three_bf16"), Some(3));
        assert_eq!(of("nothing", "nothing"), Some(0));
        assert_eq!(of("hidden", "hidden_bf16"), Some(2));
        assert_eq!(of("unknown", "unknown_f32"), None);
        assert_eq!(of("other", "other_f32"), None, "a call is no declaration");
    }
}
