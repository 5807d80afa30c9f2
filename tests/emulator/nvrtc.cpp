// NVRTC on g++: a program becomes a shared object beside this library; its "PTX" and "cubin" name that file.
#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "version.h"

namespace fs = std::filesystem;

enum nvrtcResult : int {
    NVRTC_SUCCESS = 0,
    NVRTC_ERROR_OUT_OF_MEMORY = 1,
    NVRTC_ERROR_PROGRAM_CREATION_FAILURE = 2,
    NVRTC_ERROR_INVALID_INPUT = 3,
    NVRTC_ERROR_INVALID_PROGRAM = 4,
    NVRTC_ERROR_INVALID_OPTION = 5,
    NVRTC_ERROR_COMPILATION = 6,
    NVRTC_ERROR_INTERNAL_ERROR = 11,
};

#define API extern "C" __attribute__((visibility("default"))) nvrtcResult

namespace {

struct Program {
    std::string source, name, log, image;
};

/// The folder that holds the emulator's libraries.
fs::path home() {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(home), &info);
    return fs::canonical(info.dli_fname).parent_path();
}

/// FNV-1a, 128 bits.
std::string hash(const std::string& text) {
    unsigned __int128 h = (static_cast<unsigned __int128>(0x6c62272e07bb0142) << 64) | 0x62b821756295c58d;
    for (const char c : text) {
        h ^= static_cast<unsigned char>(c);
        h *= (static_cast<unsigned __int128>(0x0000000001000000) << 64) | 0x000000000000013b;
    }
    char digits[33];
    std::snprintf(digits, sizeof digits, "%016llx%016llx", static_cast<unsigned long long>(h >> 64),
                  static_cast<unsigned long long>(h));
    return digits;
}

std::string quoted(const std::string& text) {
    std::string result = "'";
    for (const char c : text) result += c == '\'' ? "'\\''" : std::string(1, c);
    return result + "'";
}

std::string read(const fs::path& path) {
    std::ostringstream text;
    text << std::ifstream(path, std::ios::binary).rdbuf();
    return text.str();
}

bool run(const std::string& command) {
    const int status = std::system(command.c_str());
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/// Of NVRTC's options those that g++ knows too: definitions and folders of headers.
std::string options_for_gcc(const std::vector<std::string>& options) {
    std::string result;
    for (size_t i = 0; i < options.size(); i++) {
        const std::string& option = options[i];
        const auto value_of = [&](const char* name) -> const char* {
            const size_t length = std::strlen(name);
            if (option == name && i + 1 < options.size()) return options[++i].c_str();
            return option.compare(0, length, name) == 0 && option[length] == '=' ? option.c_str() + length + 1
                                                                                 : nullptr;
        };
        if (option.size() > 2 && (option.starts_with("-D") || option.starts_with("-I") || option.starts_with("-U")))
            result += " " + quoted(option);
        else if (const char* definition = value_of("--define-macro"))
            result += " " + quoted(std::string("-D") + definition);
        else if (const char* folder = value_of("--include-path"))
            result += " " + quoted(std::string("-I") + folder);
    }
    return result;
}

struct Kernel {
    std::string name, parameters, bounds;
    std::vector<std::string> namespaces;
};

/// Takes `__global__` and `__launch_bounds__(...)`, which mean nothing to g++, out of preprocessed source, and returns
/// the kernels that they mark.
std::vector<Kernel> take_kernels(std::string& source) {
    std::vector<Kernel> kernels;
    std::set<std::string> seen;
    std::vector<std::string> scopes; // of each open brace, the namespace that it opens, if it does
    std::string word, name_space, bounds;
    bool global = false;
    const auto in_word = [&](size_t i) {
        return i < source.size() && (source[i] == '_' || std::isalnum(static_cast<unsigned char>(source[i])));
    };
    const auto blank = [&](size_t from, size_t to) {
        for (; from < to; from++) source[from] = source[from] == '\n' ? '\n' : ' ';
    };
    // From an opening parenthesis to the one that closes it.
    const auto in_parentheses = [&](size_t& i) {
        const size_t open = i;
        for (int depth = 1; depth > 0 && i + 1 < source.size();) {
            const char c = source[++i];
            depth += c == '(' ? 1 : c == ')' ? -1 : 0;
        }
        return source.substr(open + 1, i - open - 1);
    };
    for (size_t i = 0; i < source.size(); i++) {
        const char c = source[i];
        if (c == '"' || c == '\'') { // literals; digit separators are not expected
            for (i++; i < source.size() && source[i] != c; i++) i += source[i] == '\\';
        } else if (in_word(i)) {
            const size_t begin = i;
            while (in_word(i + 1)) i++;
            const std::string last = std::exchange(word, source.substr(begin, i + 1 - begin));
            if (last == "namespace") name_space = word;
            if (word == "__global__") {
                global = true;
                blank(begin, i + 1);
            } else if (word == "__launch_bounds__") {
                i = std::min(source.find('(', i), source.size() - 1);
                bounds = in_parentheses(i);
                blank(begin, i + 1);
            }
        } else if (c == '{') {
            scopes.push_back(std::exchange(name_space, ""));
        } else if (c == '}' && !scopes.empty()) {
            scopes.pop_back();
        } else if (c == ';') {
            name_space.clear();
        } else if (c == '(' && global && word != "__attribute__") {
            if (seen.insert(word).second) kernels.push_back({word, in_parentheses(i), bounds, scopes});
            global = false;
            bounds.clear();
        }
    }
    return kernels;
}

/// The end of the program: its table of kernels. Each is found by its plain name, so it is declared again as `extern
/// "C"`, which does not compile if it is not.
std::string table_of(const std::vector<Kernel>& kernels) {
    std::string text = "\n# 1 \"table of kernels\"\n", table;
    for (const Kernel& kernel : kernels) {
        const std::string entry = "emu_entry_of_" + kernel.name;
        std::string close, path;
        for (const std::string& scope : kernel.namespaces) {
            if (scope.empty()) continue; // a brace of extern "C"
            text += "namespace " + scope + " { ";
            path += scope + "::";
            close += "}";
        }
        text += "extern \"C\" void " + kernel.name + "(" + kernel.parameters + ");\nconstexpr EmuKernel " + entry +
            " = EmuEntry<static_cast<void (*)(" + kernel.parameters + ")>(&" + kernel.name + ")>::entry(\"" +
            kernel.name + "\"" + (kernel.bounds.empty() ? "" : ", ") + kernel.bounds + ");" + close + "\n";
        table += path + entry + ", ";
    }
    // A variable of its own makes the loader allot the __shared__ variables when the driver asks for them.
    return text + "extern \"C\" __attribute__((visibility(\"default\"))) const EmuKernel emu_kernels[] = {" + table +
        "{}};\nextern \"C\" __attribute__((visibility(\"default\"))) void* emu_shared_variables() {\n"
        "    static thread_local char first;\n    return &first;\n}\n";
}

nvrtcResult compile(Program& program, const std::vector<std::string>& options) {
    const fs::path folder = home(), cache = folder / "kernels";
    fs::create_directories(cache);
    const std::string compiler = "g++ -std=c++20 -w -I" + quoted((folder / "include").string());
    // Kernels read memory under other types than it was written with, as float4 or uint4; integers wrap.
    const std::string code =
        " -O2 -march=native -ffp-contract=off -fno-strict-aliasing -fwrapv -ffixed-r15 -fPIC -shared"
        " -fvisibility=hidden -fno-gnu-unique -fno-exceptions -fno-rtti -fno-math-errno"
        " -fsanitize=alignment,bounds";
    const std::string own = options_for_gcc(options);
    const std::string key = hash(compiler + code + own + program.name + '\0' + program.source);
    const fs::path object = cache / (key + ".so");
    program.image = "// emulated\n" + object.string();
    if (fs::exists(object)) return NVRTC_SUCCESS;

    // Others may compile the same program at the same time: each under a name of its own, the last one stays.
    const fs::path scratch = cache / (key + "." + std::to_string(getpid()) + "." + std::to_string(gettid()));
    const auto file = [&](const char* ending) { return scratch.string() + ending; };
    std::ofstream(file(".cu")) << "# 1 \"" << program.name << "\"\n" << program.source << "\n";
    bool good = run(compiler + own + " -include emu_cuda.h -E -x c++ " + quoted(file(".cu")) + " -o " +
                    quoted(file(".ii")) + " 2> " + quoted(file(".log")));
    if (good) {
        std::string source = read(file(".ii"));
        const auto kernels = take_kernels(source);
        std::ofstream(file(".ii")) << source << table_of(kernels);
        good = run(compiler + code + " -fpreprocessed " + quoted(file(".ii")) + " -o " + quoted(file(".so")) + " " +
                   quoted((folder / "libcuda.so.1").string()) + " 2> " + quoted(file(".log")));
    }
    program.log = read(file(".log"));
    if (good) fs::rename(file(".so"), object);
    for (const char* ending : {".cu", ".ii", ".log", ".so"}) fs::remove(file(ending));
    return good ? NVRTC_SUCCESS : NVRTC_ERROR_COMPILATION;
}

std::vector<int> architectures() {
    std::vector<int> all = {75, 80, 86, 89, 90, 100, 120};
    const char* newest = std::getenv("CUDA_EMULATOR_ARCHITECTURE");
    std::erase_if(all, [&](int arch) { return newest != nullptr && arch > std::atoi(newest); });
    return all;
}

nvrtcResult get(const std::string& text, char* out) {
    std::memcpy(out, text.c_str(), text.size() + 1);
    return NVRTC_SUCCESS;
}

} // namespace

API nvrtcVersion(int* major, int* minor) {
    const int version = emulated_version("CUDA_EMULATOR_LIBRARIES", 13000);
    *major = version / 1000, *minor = version / 10 % 100;
    return NVRTC_SUCCESS;
}
// Those before Blackwell are known to all versions, which end with CUDA_EMULATOR_ARCHITECTURE.
API nvrtcGetNumSupportedArchs(int* count) {
    *count = static_cast<int>(architectures().size());
    return NVRTC_SUCCESS;
}
API nvrtcGetSupportedArchs(int* all) {
    std::ranges::copy(architectures(), all);
    return NVRTC_SUCCESS;
}
API nvrtcCreateProgram(Program** program, const char* source, const char* name, int header_count, const char* const*,
                       const char* const*) {
    if (source == nullptr || header_count != 0) return NVRTC_ERROR_INVALID_INPUT;
    *program = new Program{source, name == nullptr ? "default_program" : name, {}, {}};
    return NVRTC_SUCCESS;
}
API nvrtcDestroyProgram(Program** program) {
    delete *program;
    *program = nullptr;
    return NVRTC_SUCCESS;
}
API nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    try {
        return compile(*program, std::vector<std::string>(options, options + count));
    } catch (const std::exception& error) {
        program->log = error.what();
        return NVRTC_ERROR_INTERNAL_ERROR;
    }
}
API nvrtcGetProgramLogSize(Program* program, size_t* size) {
    *size = program->log.size() + 1;
    return NVRTC_SUCCESS;
}
API nvrtcGetProgramLog(Program* program, char* log) { return get(program->log, log); }

#define IMAGE(size_name, get_name)                                      \
    API size_name(Program* program, size_t* size) {                     \
        if (program->image.empty()) return NVRTC_ERROR_INVALID_PROGRAM; \
        *size = program->image.size() + 1;                              \
        return NVRTC_SUCCESS;                                           \
    }                                                                   \
    API get_name(Program* program, char* image) { return get(program->image, image); }
IMAGE(nvrtcGetPTXSize, nvrtcGetPTX)
IMAGE(nvrtcGetCUBINSize, nvrtcGetCUBIN)

extern "C" __attribute__((visibility("default"))) const char* nvrtcGetErrorString(nvrtcResult result) {
    switch (result) {
    case NVRTC_SUCCESS: return "NVRTC_SUCCESS";
    case NVRTC_ERROR_OUT_OF_MEMORY: return "NVRTC_ERROR_OUT_OF_MEMORY";
    case NVRTC_ERROR_PROGRAM_CREATION_FAILURE: return "NVRTC_ERROR_PROGRAM_CREATION_FAILURE";
    case NVRTC_ERROR_INVALID_INPUT: return "NVRTC_ERROR_INVALID_INPUT";
    case NVRTC_ERROR_INVALID_PROGRAM: return "NVRTC_ERROR_INVALID_PROGRAM";
    case NVRTC_ERROR_INVALID_OPTION: return "NVRTC_ERROR_INVALID_OPTION";
    case NVRTC_ERROR_COMPILATION: return "NVRTC_ERROR_COMPILATION";
    case NVRTC_ERROR_INTERNAL_ERROR: return "NVRTC_ERROR_INTERNAL_ERROR";
    }
    return "NVRTC_ERROR unknown";
}
