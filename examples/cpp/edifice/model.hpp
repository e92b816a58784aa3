// A bundle's graphs on an execution provider.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "bundle.hpp"
#include "checks.hpp"
#include "errors.hpp"
#include "graph.hpp"
#include "onnxruntime.hpp"
#include "runtime.hpp"
#include "shape.hpp"
#include "tensor.hpp"

namespace edifice {

/// A bundle's graphs on an execution provider. Any number of threads may use one Model at once.
class Model {
public:
    explicit Model(Bundle bundle, Options options = {})
        : bundle_((check_library(), std::move(bundle))),
          options_(std::move(options)),
          session_options_(session_options_for(options_)) {}

    const Bundle& bundle() const { return bundle_; }
    const Options& options() const { return options_; }

    /// Runs the window graph on inputs in their order, and gives its outputs in theirs.
    std::vector<Tensor> operator()(const std::vector<Input>& inputs) { return call("window", inputs); }

    /// Runs the window graph on inputs by name, and gives its outputs by name.
    std::map<std::string, Tensor> run(const std::map<std::string, Input>& inputs) {
        const GraphSpec& graph = bundle_.graph("window");
        std::vector<Input> in_order;
        for (const TensorSpec& spec : graph.inputs) {
            const auto found = inputs.find(spec.name);
            if (found != inputs.end()) in_order.push_back(found->second);
        }
        if (in_order.size() != inputs.size() || in_order.size() != graph.inputs.size()) {
            std::string given;
            for (const auto& [name, input] : inputs) given += (given.empty() ? "" : ", ") + name;
            throw RequestError("the model takes " + text(graph.inputs) + "; got " +
                               (given.empty() ? "nothing" : given));
        }
        std::vector<Tensor> outputs = call("window", in_order);
        std::map<std::string, Tensor> named;
        for (std::size_t i = 0; i < outputs.size(); ++i) named.emplace(graph.outputs[i].name, std::move(outputs[i]));
        return named;
    }

    /// Runs any graph on all its inputs, states among them, in their order.
    std::vector<Tensor> call(const std::string& name, const std::vector<Input>& inputs) {
        const GraphSpec& graph = bundle_.graph(name);
        check_inputs(graph, inputs);
        std::vector<const char*> reads, gives;
        std::vector<Ort::Value> values;
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            reads.push_back(graph.inputs[i].name.c_str());
            values.push_back(view(inputs[i].numbers, inputs[i].shape));
        }
        for (const TensorSpec& spec : graph.outputs) gives.push_back(spec.name.c_str());
        const auto held = session(name);
        std::vector<Tensor> outputs;
        try {
            for (Ort::Value& value : held->Run(Ort::RunOptions{nullptr}, reads.data(), values.data(), values.size(),
                                               gives.data(), gives.size())) {
                outputs.emplace_back(std::move(value));
            }
        } catch (const Ort::Exception& error) {
            std::string given;
            for (std::size_t i = 0; i < inputs.size(); ++i) {
                given += (i == 0 ? "" : ", ") + graph.inputs[i].name + " " + text(inputs[i].shape);
            }
            throw CheckError("ONNX Runtime failed on " + given + " with provider " + options_.provider + ": " +
                             error.what());
        }
        check_finite(graph.outputs, outputs, "");
        return outputs;
    }

    /// The session of a graph, loaded when it is first asked for. It lives as long as someone holds it.
    std::shared_ptr<Ort::Session> session(const std::string& name) {
        const GraphSpec& graph = bundle_.graph(name);
        const std::lock_guard<std::mutex> lock(mutex_);
        std::shared_ptr<Ort::Session>& held = sessions_[name];
        if (held == nullptr) {
            const std::filesystem::path path = bundle_.checked_model(graph);
            try {
                // The path goes as it is, of wide characters on Windows.
                const auto loaded =
                    std::make_shared<Loaded>(Loaded{Ort::Env(kSilent, "edifice"), Ort::Session(nullptr)});
                loaded->session = Ort::Session(loaded->env, path.c_str(), session_options_);
                check_signature(graph, loaded->session, path);
                held = std::shared_ptr<Ort::Session>(loaded, &loaded->session);
            } catch (const Ort::Exception& error) {
                throw CheckError("ONNX Runtime can't load " + text(path) + " with provider " + options_.provider +
                                 ": " + error.what());
            }
        }
        return held;
    }

private:
    struct Loaded {
        Ort::Env env;  // ONNX Runtime counts them: all are one
        Ort::Session session;
    };

    // Whatever goes wrong is in an exception, so nothing need be on standard error as well.
    static constexpr OrtLoggingLevel kSilent = ORT_LOGGING_LEVEL_FATAL;

    /// Refuses a model that is not what the manifest says, before buffers are made for it.
    static void check_signature(const GraphSpec& graph, const Ort::Session& session,
                                const std::filesystem::path& path) {
        Ort::AllocatorWithDefaultOptions allocator;
        const auto check = [&](const std::vector<TensorSpec>& specs, std::size_t found, auto name_of,
                               auto type_of_one) {
            bool same = specs.size() == found;
            for (std::size_t i = 0; same && i < found; ++i) {
                const auto type = type_of_one(i);
                same = type.GetONNXType() == ONNX_TYPE_TENSOR && specs[i].name == name_of(i).get();
                if (!same) break;
                const auto info = type.GetTensorTypeAndShapeInfo();
                const Shape shape = info.GetShape();
                same = specs[i].type == info.GetElementType() &&
                       std::equal(
                           specs[i].shape.begin(), specs[i].shape.end(), shape.begin(), shape.end(),
                           [](const Size& size, std::int64_t is) { return !size.free.empty() || size.number == is; });
            }
            if (!same) {
                throw CheckError("model " + text(path) + ": its tensors are not those in the manifest, " + text(specs) +
                                 "; build or copy the bundle again");
            }
        };
        check(
            graph.inputs, session.GetInputCount(),
            [&](std::size_t i) { return session.GetInputNameAllocated(i, allocator); },
            [&](std::size_t i) { return session.GetInputTypeInfo(i); });
        check(
            graph.outputs, session.GetOutputCount(),
            [&](std::size_t i) { return session.GetOutputNameAllocated(i, allocator); },
            [&](std::size_t i) { return session.GetOutputTypeInfo(i); });
    }

    Bundle bundle_;
    Options options_;
    Ort::Env env_{kSilent, "edifice"};  // before the options: some providers log when they are asked for
    Ort::SessionOptions session_options_;
    std::mutex mutex_;
    std::map<std::string, std::shared_ptr<Ort::Session>> sessions_;
};

}  // namespace edifice
