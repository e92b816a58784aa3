// ONNX Runtime: which versions are taken, and its execution providers.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "errors.hpp"

namespace edifice {

constexpr int kOldestRuntime = 24;  // ONNX Runtime 1.24: the first that is right on every graph

/// Refuses a version of ONNX Runtime, such as "1.23.2", that is wrong on some graphs or fails on them.
inline void check_runtime(const std::string& version) {
    int major = 0, minor = 0;
    if (std::sscanf(version.c_str(), "%d.%d", &major, &minor) != 2 || major < 1 ||
        (major == 1 && minor < kOldestRuntime)) {
        throw RequestError("ONNX Runtime " + version + " is older than 1." + std::to_string(kOldestRuntime) +
                           ", the first that is right on every graph of a bundle; link and ship a newer one");
    }
}

/// An older library has no table of functions for newer headers, and every call of it would go nowhere.
inline void check_library() {
    check_runtime(Ort::GetVersionString());  // the library's, which may be newer than the headers
    if (OrtGetApiBase()->GetApi(ORT_API_VERSION) == nullptr) {
        throw RequestError("ONNX Runtime " + Ort::GetVersionString() + " is older than the headers of 1." +
                           std::to_string(ORT_API_VERSION) +
                           " that this program was built with; ship a library that is not");
    }
}

struct Options {
    std::string provider = "cpu";  // or cuda, dml, coreml, webgpu: that one or an error
    int threads = 1;               // within an operator
};

/// Settings of sessions on a provider, which is that one or refused.
inline Ort::SessionOptions session_options_for(const Options& options) {
    if (options.threads < 1) throw RequestError("threads is " + std::to_string(options.threads) + "; give 1 or more");
    Ort::SessionOptions session_options;
    session_options.SetIntraOpNumThreads(options.threads);
    struct Provider {
        std::string name, full, key;
    };
    static const std::array<Provider, 5> known{{{"cpu", "CPUExecutionProvider", ""},
                                                {"cuda", "CUDAExecutionProvider", ""},
                                                {"dml", "DmlExecutionProvider", "DML"},
                                                {"coreml", "CoreMLExecutionProvider", "CoreML"},
                                                {"webgpu", "WebGpuExecutionProvider", "WebGPU"}}};
    const auto asked = std::find_if(known.begin(), known.end(),
                                    [&](const Provider& each) { return each.name == options.provider; });
    if (asked == known.end()) {
        throw RequestError("provider '" + options.provider +
                           "' is none that this program knows; name cpu, cuda, dml, coreml or webgpu");
    }
    const std::vector<std::string> built_in = Ort::GetAvailableProviders();
    if (std::find(built_in.begin(), built_in.end(), asked->full) == built_in.end()) {
        throw RequestError("provider '" + asked->name + "' is not in this build of ONNX Runtime " +
                           Ort::GetVersionString() + "; link one that has it, or name cpu");
    }
    try {
        if (asked->name == "cuda") {
            const OrtApi& api = Ort::GetApi();
            OrtCUDAProviderOptionsV2* cuda = nullptr;
            Ort::ThrowOnError(api.CreateCUDAProviderOptions(&cuda));
            const std::unique_ptr<OrtCUDAProviderOptionsV2, void (*)(OrtCUDAProviderOptionsV2*)> held(
                cuda, [](OrtCUDAProviderOptionsV2* each) { Ort::GetApi().ReleaseCUDAProviderOptions(each); });
            const char *const key = "use_tf32", *const off = "0";  // its 10 bits of mantissa are not enough
            Ort::ThrowOnError(api.UpdateCUDAProviderOptions(cuda, &key, &off, 1));
            session_options.AppendExecutionProvider_CUDA_V2(*cuda);
        } else if (asked->name != "cpu") {
            if (asked->name == "dml") session_options.DisableMemPattern();  // it asks for that
            session_options.AppendExecutionProvider(asked->key, {});
        }
    } catch (const Ort::Exception& error) {
        throw RequestError("provider '" + asked->name + "' can't be had: " + error.what());
    }
    return session_options;
}

}  // namespace edifice
