// Modules, functions and launches.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fstream>
#include <link.h>
#include <string>
#include <vector>

#include "driver.h"
#include "grid.h"

namespace {

/// What the emulated NVRTC returns as PTX or cubin: this line, then the path of a shared object, then NUL.
constexpr char MAGIC[] = "// emulated\n";

struct Function {
    const EmuKernel* kernel;
    const Program* program;
    /// What cuFuncSetAttribute allows.
    size_t max_dynamic_shared = 48 << 10;
    bool opted_in = false;
};

struct Module {
    Program program;
    std::vector<Function*> functions = {};
    std::vector<CUdeviceptr> globals = {};
};

Handles<Module> modules;
Handles<Function> functions;

/// The size of a program's thread-local storage: of all its `__shared__` variables.
size_t thread_local_size(void* program) {
    struct link_map* map = nullptr;
    dlinfo(program, RTLD_DI_LINKMAP, &map);
    std::pair<ElfW(Addr), size_t> wanted = {map->l_addr, 0};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            auto& found = *static_cast<std::pair<ElfW(Addr), size_t>*>(data);
            if (info->dlpi_addr != found.first) return 0;
            for (int i = 0; i < info->dlpi_phnum; i++)
                if (info->dlpi_phdr[i].p_type == PT_TLS) found.second = info->dlpi_phdr[i].p_memsz;
            return 1;
        },
        &wanted);
    return wanted.second;
}

/// Whether this launch is stopped: the one whose number the file of CUDA_EMULATOR_STOP has, which is counted down by every launch
/// and removed by the last.
bool stopped() {
    static const char* const path = std::getenv("CUDA_EMULATOR_STOP");
    static long left = -1;
    if (path == nullptr) return false;
    if (left < 0) {
        std::ifstream file(path);
        if (!(file >> left)) return false;
    }
    if (--left > 0) return false;
    left = -1;
    std::remove(path);
    return true;
}

CUresult launch(Function* function, dim3 grid, dim3 block, unsigned shared, CUstream stream, void** parameters,
                void** extra) {
    ENTER;
    if (functions.find(function) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    const EmuKernel& kernel = *function->kernel;
    const unsigned long long threads = static_cast<unsigned long long>(block.x) * block.y * block.z;
    if (extra != nullptr || (parameters == nullptr && kernel.parameter_count > 0)) return CUDA_ERROR_INVALID_VALUE;
    if (threads == 0 || threads > MAX_THREADS || block.z > 64) return CUDA_ERROR_INVALID_VALUE;
    if (threads > kernel.max_threads) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return CUDA_ERROR_INVALID_VALUE;
    if (grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) return CUDA_ERROR_INVALID_VALUE;
    if (shared > function->max_dynamic_shared) return CUDA_ERROR_INVALID_VALUE;
    // Without opting in, dynamic memory and the kernel's own variables (here: those of its module) share 48 KiB.
    if (shared > 0 && !function->opted_in && shared + function->program->shared_bytes > 48 << 10)
        return CUDA_ERROR_INVALID_VALUE;

    Launch work = {&kernel, function->program, grid, block, shared, {}};
    for (unsigned i = 0; i < kernel.parameter_count; i++) {
        const auto* bytes = static_cast<const std::byte*>(parameters[i]);
        work.parameters.insert(work.parameters.end(), bytes, bytes + kernel.parameter_sizes[i]);
        work.parameters.resize((work.parameters.size() + 15) / 16 * 16);
    }
    return enqueue(stream, NodeType::Kernel, [work = std::move(work)] { return stopped() ? CUDA_ERROR_LAUNCH_FAILED : run_grid(work); });
}

} // namespace

API cuModuleLoadData(Module** module, const void* image) {
    ENTER;
    TRY(forbid_during_capture());
    const auto* text = static_cast<const char*>(image);
    if (std::strncmp(text, MAGIC, sizeof MAGIC - 1) != 0) return CUDA_ERROR_INVALID_IMAGE;
    void* program = dlopen(text + sizeof MAGIC - 1, RTLD_NOW | RTLD_LOCAL);
    if (program == nullptr) {
        std::fprintf(stderr, "emulator: %s\n", dlerror());
        return CUDA_ERROR_FILE_NOT_FOUND;
    }
    const auto* kernels = static_cast<const EmuKernel*>(dlsym(program, "emu_kernels"));
    const auto allot = reinterpret_cast<void* (*)()>(dlsym(program, "emu_shared_variables"));
    if (kernels == nullptr || allot == nullptr) return CUDA_ERROR_SHARED_OBJECT_INIT_FAILED;
    *module = modules.create(Program{program, kernels, thread_local_size(program), allot});
    return CUDA_SUCCESS;
}
API cuModuleUnload(Module* module) {
    ENTER;
    if (modules.find(module) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    for (Function* function : module->functions) functions.destroy(function);
    for (const CUdeviceptr global : module->globals) remove_global(global);
    dlclose(module->program.handle);
    return modules.destroy(module);
}
API cuModuleGetFunction(Function** function, Module* module, const char* name) {
    ENTER;
    if (modules.find(module) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    for (const EmuKernel* kernel = module->program.kernels; kernel->name != nullptr; kernel++) {
        if (std::strcmp(kernel->name, name) != 0) continue;
        *function = functions.create(kernel, &module->program);
        module->functions.push_back(*function);
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_NOT_FOUND;
}
API cuModuleGetGlobal_v2(CUdeviceptr* address, size_t* bytes, Module* module, const char* name) {
    ENTER;
    if (modules.find(module) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    void* symbol = dlsym(module->program.handle, name);
    Dl_info info;
    ElfW(Sym)* entry = nullptr;
    if (symbol == nullptr || dladdr1(symbol, &info, reinterpret_cast<void**>(&entry), RTLD_DL_SYMENT) == 0)
        return CUDA_ERROR_NOT_FOUND;
    const auto global = reinterpret_cast<CUdeviceptr>(symbol);
    if (address != nullptr) *address = global;
    if (bytes != nullptr) *bytes = entry->st_size;
    add_global(global, entry->st_size);
    module->globals.push_back(global);
    return CUDA_SUCCESS;
}

// Functions, by CUDA's numbers of their attributes.

API cuFuncGetAttribute(int* value, int attribute, Function* function) {
    ENTER;
    if (functions.find(function) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    *value = 0;
    if (attribute == 0) *value = static_cast<int>(function->kernel->max_threads);
    if (attribute == 4) *value = static_cast<int>(std::min(255u, 65536 / function->kernel->max_threads)); // registers
    if (attribute == 5 || attribute == 6) *value = 90;
    if (attribute == 8) *value = static_cast<int>(function->max_dynamic_shared);
    return CUDA_SUCCESS;
}
API cuFuncSetAttribute(Function* function, int attribute, int value) {
    ENTER;
    if (functions.find(function) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (attribute != 8) return CUDA_SUCCESS;
    if (value < 0 || static_cast<size_t>(value) > MAX_SHARED) return CUDA_ERROR_INVALID_VALUE;
    function->max_dynamic_shared = static_cast<size_t>(value);
    function->opted_in = true;
    return CUDA_SUCCESS;
}
API cuFuncSetCacheConfig(Function*, int) {
    ENTER;
    return CUDA_SUCCESS;
}

// Occupancy: what threads and shared memory allow; registers are not known.

API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, Function* function, int threads, size_t shared,
                                                         unsigned) {
    ENTER;
    if (functions.find(function) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (threads <= 0) return CUDA_ERROR_INVALID_VALUE;
    const int by_threads = 2048 / ((threads + 31) / 32 * 32);
    const int by_shared = static_cast<int>((228 << 10) / (shared + (1 << 10)));
    *blocks = std::min({32, by_threads, by_shared});
    return CUDA_SUCCESS;
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* function, int threads, size_t shared) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}
API cuOccupancyMaxPotentialBlockSize(int* grid, int* block, Function* function, size_t (*)(int), size_t, int limit) {
    ENTER;
    if (functions.find(function) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    const int most = static_cast<int>(function->kernel->max_threads);
    *block = limit > 0 ? std::min(limit, most) : most;
    *grid = 132 * (2048 / *block);
    return CUDA_SUCCESS;
}
API cuOccupancyMaxPotentialBlockSizeWithFlags(int* grid, int* block, Function* function, size_t (*shared)(int),
                                              size_t bytes, int limit, unsigned) {
    return cuOccupancyMaxPotentialBlockSize(grid, block, function, shared, bytes, limit);
}

// Launches.

API cuLaunchKernel(Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void** parameters,
                   void** extra) {
    return launch(function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, stream, parameters, extra);
}

struct LaunchConfig {
    unsigned grid[3], block[3], shared;
    CUstream stream;
    struct Attribute {
        int id;
        char padding[4];
        unsigned value[16];
    }* attributes;
    unsigned attribute_count;
};

/// Attributes say how to schedule, which means nothing here; only clusters would change what a kernel may do.
API cuLaunchKernelEx(const LaunchConfig* config, Function* function, void** parameters, void** extra) {
    constexpr int CLUSTER_DIMENSION = 4;
    for (unsigned i = 0; i < config->attribute_count; i++) {
        const auto& attribute = config->attributes[i];
        if (attribute.id == CLUSTER_DIMENSION && attribute.value[0] * attribute.value[1] * attribute.value[2] != 1)
            return CUDA_ERROR_NOT_SUPPORTED;
    }
    const auto [gx, gy, gz] = config->grid;
    const auto [bx, by, bz] = config->block;
    return launch(function, {gx, gy, gz}, {bx, by, bz}, config->shared, config->stream, parameters, extra);
}
