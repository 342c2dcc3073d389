//! Compiles `kernels/` where a feature asks for it: for the host with the C++ compiler (`simt`), for the device with
//! nvcc (`cuda`). With neither, it does nothing, so that a plain build needs no compiler but rustc and ring's.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(any(feature = "simt", feature = "cuda"))]
    println!("cargo:rerun-if-changed=kernels");
    #[cfg(feature = "simt")]
    simt::compile();
    #[cfg(feature = "cuda")]
    cuda::compile();
}

#[cfg(feature = "simt")]
mod simt {
    pub fn compile() {
        cc::Build::new()
            .cpp(true)
            .std("c++17")
            // A fiber switch is a few instructions; at -O0 the code around it would cost ten times as much.
            .opt_level(2)
            .flag("-fno-exceptions")
            .warnings_into_errors(true)
            .extra_warnings(true)
            .files(["kernels/simt/fiber.cpp", "kernels/simt/simt.cpp", "kernels/simt/kernels.cpp"])
            .compile("ferrotron_simt");
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::env;
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// H200, RTX Blackwell, DGX Spark. The `a` targets have the instructions that their plain forms lack.
    const TARGETS: [&str; 3] = ["90a", "120a", "121a"];

    /// Compiles every `kernels/*.cu` into `$OUT_DIR/kernels.fatbin`, which `src/backend/cuda` embeds.
    pub fn compile() {
        for name in ["CUDA_HOME", "CUDA_PATH"] {
            println!("cargo:rerun-if-env-changed={name}");
        }
        let nvcc = candidates().into_iter().find(|path| path.is_file()).unwrap_or_else(|| {
            panic!(
                "feature `cuda` needs nvcc, which is neither in $CUDA_HOME/bin, $CUDA_PATH/bin nor $PATH, nor where \
                 tools/install-cuda-toolchain.sh puts it. Run that script (no GPU or root needed, 276 MB), or set \
                 CUDA_HOME to a CUDA 13 toolkit, or build without the feature."
            )
        });
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR for every build script"));
        let unit = out.join("kernels.cu");
        fs::write(&unit, all_kernels()).unwrap_or_else(|e| panic!("{}: {e}", unit.display()));

        // One unit for all kernels: nvcc starts three compilers per target, and one image is one module to load.
        let mut command = Command::new(&nvcc);
        command.args(["-std=c++17", "-O3", "-Werror", "all-warnings", "--threads", "0", "-fatbin"]);
        for target in TARGETS {
            command.arg(format!("-gencode=arch=compute_{target},code=sm_{target}"));
        }
        command.arg("-I").arg("kernels").arg("-o").arg(out.join("kernels.fatbin")).arg(&unit);
        let status = command.status().unwrap_or_else(|e| panic!("{}: {e}", nvcc.display()));
        assert!(status.success(), "{command:?} ended with {status}");
    }

    fn candidates() -> Vec<PathBuf> {
        let homes = ["CUDA_HOME", "CUDA_PATH"]
            .iter()
            .filter_map(env::var_os)
            .map(|home| Path::new(&home).join("bin"));
        let path = env::var_os("PATH").unwrap_or_default();
        let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| {
            let home = env::var_os("HOME")?;
            Some(Path::new(&home).join(".cache"))
        });
        let installed = cache.map(|cache| cache.join("cuda-toolchain/13.0/bin"));
        homes.chain(env::split_paths(&path)).chain(installed).map(|folder| folder.join("nvcc")).collect()
    }

    fn all_kernels() -> String {
        let mut names: Vec<String> = fs::read_dir("kernels")
            .expect("a package has its kernels beside its build script")
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.ends_with(".cu"))
            .collect();
        // The order of a folder is the file system's; the image should be the same everywhere.
        names.sort();
        names.iter().map(|name| format!("#include \"{name}\"\n")).collect()
    }
}
