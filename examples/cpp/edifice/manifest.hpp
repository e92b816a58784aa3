// manifest.json, of which nothing is trusted before it was checked.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "graph.hpp"
#include "onnxruntime.hpp"
#include "shape.hpp"
#include "tensor.hpp"

namespace edifice {

constexpr int kSchema = 6;                  // of the manifests that are read
constexpr std::int64_t kMaxSize = 1 << 20;  // of what a graph is made for

/// What a manifest says. What could not be is refused, and its paths stay in the bundle.
class Manifest {
public:
    /// place: of the bundle, for messages.
    Manifest(std::string place, const std::string& content) : place_(std::move(place)) {
        try {
            parse(nlohmann::json::parse(content));
        } catch (const nlohmann::json::exception& error) {
            throw damaged(error.what());
        }
    }

    struct File {
        std::uint64_t size;
        std::string sha256;
    };

    std::string program;  // name of the architecture, or of the module's class
    bool is_module = false;
    std::string weights;                      // SHA-256 of the model's weights: whose states these are
    Sizes sizes;                              // what graphs are made for; other numbers will do
    std::string frames;                       // the symbol of frames, empty where there are none
    std::map<std::string, GraphSpec> graphs;  // window, stream and prefill, or a part of them
    std::vector<StateSpec> states;
    std::map<std::string, File> files;  // by path in the bundle

    bool has(const std::string& graph) const { return graphs.count(graph) != 0; }

    CheckError damaged(const std::string& problem) const {
        return CheckError(place_ + "manifest.json: " + problem + "; build or copy the bundle again");
    }

private:
    void parse(const nlohmann::json& manifest) {
        const nlohmann::json& schema = manifest.at("schema_version");
        if (!schema.is_number_integer() || schema < 1) throw damaged("schema_version is " + schema.dump());
        if (schema > kSchema) {
            throw RequestError(place_ + "has schema " + schema.dump() + ", newer than " + std::to_string(kSchema) +
                               ", the newest that this program reads; take a newer sample");
        }
        if (schema < kSchema) {
            throw RequestError(place_ + "has schema " + schema.dump() + ", older than " + std::to_string(kSchema) +
                               "; build it again");
        }
        for (const auto& [name, entry] : manifest.at("files").items()) {
            files[inside(name)] = {entry.at("size").get<std::uint64_t>(), entry.at("sha256").get<std::string>()};
        }
        program = manifest.at("program").at("name").get<std::string>();
        const std::string kind = manifest.at("program").at("kind").get<std::string>();
        is_module = kind == "module";
        if (!is_module && kind != "architecture") throw damaged("the program's kind is '" + kind + "'");
        weights = parse_weights(manifest);
        for (const auto& [symbol, size] : manifest.at("sizes").items()) {
            sizes[symbol] = whole(size, 1, kMaxSize, "the size " + symbol);
        }
        if (const nlohmann::json& symbol = manifest.at("frames"); !symbol.is_null()) {
            frames = symbol.get<std::string>();
            if (sizes.count(frames) == 0) throw damaged("frames is '" + frames + "', which is none of the sizes");
        }
        for (const nlohmann::json& entry : manifest.at("states")) states.push_back(parse_state(entry));
        for (const auto& [name, entry] : manifest.at("graphs").items()) graphs[name] = parse_graph(name, entry);
        check_graphs();
    }

    std::string parse_weights(const nlohmann::json& manifest) const {
        const nlohmann::json& reference = manifest.at("reference");
        if (reference.is_null()) return manifest.at("weights").at("sha256").get<std::string>();  // of a module
        const auto found = files.find(inside(reference.get<std::string>()));
        if (found == files.end()) throw damaged("the reference is not listed under files");
        return found->second.sha256;
    }

    StateSpec parse_state(const nlohmann::json& entry) const {
        StateSpec state{parse_tensor_spec(entry), entry.at("initial")};
        const auto type = state.tensor.type;
        const nlohmann::json& initial = state.initial;
        const std::vector<Size>& shape = state.tensor.shape;
        const auto is_past = [](const Size& size) { return size.free == kPast; };
        const auto is_free = [](const Size& size) { return !size.free.empty(); };
        const auto growing = std::count_if(shape.begin(), shape.end(), is_past);
        if (shape.empty() || !is_free(shape[0]) || is_past(shape[0]) || growing > 1 ||
            std::count_if(shape.begin(), shape.end(), is_free) > 1 + growing) {
            throw damaged("the state " + text(state.tensor) + " does not begin with the batch, or is free otherwise");
        }
        if (growing != 0 && (sizes.count(kPast) == 0 || initial.is_string())) {
            throw damaged("the state " + text(state.tensor) + " grows from nothing: it needs the size past, and no file");
        }
        if (initial.is_string()) {
            inside(initial.get<std::string>());
        } else if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
            if (!initial.is_number() || !(std::abs(initial.get<double>()) <= 0x1p127)) {
                throw damaged("a state starts from " + initial.dump());
            }
        } else if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 || type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32) {
            const bool wide = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
            whole(initial, 0, wide ? std::int64_t{1} << 62 : (std::int64_t{1} << 31) - 1, "what a state starts from");
        } else {
            throw damaged("the state " + text(state.tensor) + " is not float32, int64 or int32");
        }
        return state;
    }

    /// Refuses graphs that take or give something else than graphs of their names do.
    void check_graphs() const {
        const std::size_t known = graphs.count("window") + graphs.count("stream") + graphs.count("prefill");
        if (graphs.empty() || graphs.size() != known || has("stream") == states.empty() ||
            (has("prefill") && (!has("stream") || frames.empty()))) {
            throw damaged("the graphs are not window, stream and prefill, or a part of them");
        }
        for (const auto& [name, graph] : graphs) {
            for (const TensorSpec& input : graph.inputs) {
                for (const Size& size : input.shape) {
                    if (!size.free.empty() && sizes.count(size.free) == 0) throw not_such(name);
                }
            }
            if (name != "window" && !carries_states(name, graph)) throw not_such(name);
        }
        if (has("prefill") && !takes_frames_of(graphs.at("stream"), graphs.at("prefill"))) throw not_such("prefill");
    }

    CheckError not_such(const std::string& name) const {
        return damaged("the " + name + " graph takes or gives other tensors than such a graph does");
    }

    /// What a graph makes of the size of states that grow: a sum, its symbols in order.
    std::string longer(const std::string& name) const {
        const std::string past = kPast;
        if (name == "stream") return past + " + 1";
        return past < frames ? past + " + " + frames : frames + " + " + past;
    }

    /// Whether its last tensors are the states, and all are of the batch; what prefill takes is of frames then.
    bool carries_states(const std::string& name, const GraphSpec& graph) const {
        const Size batch = states[0].tensor.shape[0];
        const auto sized = [](const TensorSpec& tensor, const std::vector<Size>& first) {
            return tensor.shape.size() >= first.size() &&
                   std::equal(first.begin(), first.end(), tensor.shape.begin()) &&
                   std::all_of(tensor.shape.begin() + static_cast<std::ptrdiff_t>(first.size()), tensor.shape.end(),
                               [](const Size& size) { return size.free.empty(); });
        };
        const auto sound = [&](const std::vector<TensorSpec>& tensors, const std::vector<Size>& first,
                               const std::string& prefix) {
            const std::size_t own = tensors.size() - states.size();
            for (std::size_t i = 0; i < tensors.size(); ++i) {
                if (i < own) {
                    if (!sized(tensors[i], first)) return false;
                    continue;
                }
                TensorSpec state = states[i - own].tensor;
                if (prefix == "present.") {
                    for (Size& size : state.shape) size.free = size.free == kPast ? longer(name) : size.free;
                }
                const bool same = tensors[i].name == prefix + state.name && tensors[i].is_like(state);
                if (!same || !(state.shape[0] == batch)) return false;
            }
            return true;
        };
        const std::vector<Size> one{batch}, several{batch, Size{0, frames}};
        return sound(graph.inputs, name == "prefill" ? several : one, "past.") && sound(graph.outputs, one, "present.");
    }

    /// Whether a prefill graph takes what a stream graph takes, with frames, and gives the same.
    static bool takes_frames_of(const GraphSpec& stream, const GraphSpec& prefill) {
        std::vector<TensorSpec> pieces = prefill.own_inputs();
        for (TensorSpec& each : pieces) each.shape.erase(each.shape.begin() + 1);
        const auto like = [](const std::vector<TensorSpec>& some, const std::vector<TensorSpec>& others) {
            return std::equal(some.begin(), some.end(), others.begin(), others.end(),
                              [](const TensorSpec& one, const TensorSpec& other) { return one.is_like(other); });
        };
        return like(stream.own_inputs(), pieces) && like(stream.own_outputs(), prefill.own_outputs());
    }

    GraphSpec parse_graph(const std::string& name, const nlohmann::json& entry) const {
        GraphSpec spec;
        spec.model = inside(entry.at("model").get<std::string>());
        if (const auto kept = entry.find("weights"); kept != entry.end() && !kept->is_null()) {
            spec.weights = beside(inside(kept->get<std::string>()), spec.model);
        }
        for (const nlohmann::json& tensor : entry.at("inputs")) {
            spec.inputs.push_back(parse_tensor_spec(tensor));
            spec.inputs.back().values = parse_values(tensor.at("values"), spec.inputs.back());
        }
        for (const nlohmann::json& tensor : entry.at("outputs")) spec.outputs.push_back(parse_tensor_spec(tensor));
        spec.states = name == "window" ? 0 : states.size();
        if (std::min(spec.inputs.size(), spec.outputs.size()) <= spec.states) throw not_such(name);
        for (const nlohmann::json& folder : entry.at("test_data")) {
            spec.test_data.push_back(inside(folder.get<std::string>()));
        }
        if (spec.test_data.empty()) throw damaged("'" + spec.model + "' has no test data");
        for (const auto& [symbol, bounds] : entry.at("limits").items()) {
            Limits& limits = spec.limits[symbol];
            const std::string place = "a limit of " + symbol;
            limits.least = whole(bounds.at(0), 1, limits.most, place);
            if (!bounds.at(1).is_null()) limits.most = whole(bounds.at(1), limits.least, limits.most, place);
        }
        if (const nlohmann::json& sequence = entry.at("test_sequence"); !sequence.is_null()) {
            spec.test_sequence = inside(sequence.at("folder").get<std::string>());
        }
        return spec;
    }

    /// A file that is listed, in the folder of a model.
    std::string beside(const std::string& name, const std::string& model) const {
        const auto folder = [](const std::string& path) { return path.substr(0, path.rfind('/') + 1); };
        if (name == model || folder(name) != folder(model)) {
            throw damaged("the weights '" + name + "' are not a file beside '" + model + "'");
        }
        if (files.count(name) == 0) throw damaged("'" + name + "' is used and not listed under files");
        return name;
    }

    /// A whole number within bounds.
    std::int64_t whole(const nlohmann::json& entry, std::int64_t least, std::int64_t most,
                       const std::string& place) const {
        const std::int64_t number = entry.is_number_integer() ? entry.get<std::int64_t>() : least - 1;
        if (number < least || number > most) {
            throw damaged(place + " is " + entry.dump() + ", and not " + std::to_string(least) + " to " +
                          std::to_string(most));
        }
        return number;
    }

    Values parse_values(const nlohmann::json& entry, const TensorSpec& spec) const {
        Values values;
        values.kind = entry.at("kind").get<std::string>();
        const bool bounded = values.kind == "ids" || values.kind == "integers";
        const bool is_float =
            spec.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || spec.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        const bool known = is_float ? values.kind == "normal" : bounded || values.kind == "mask";
        if (!known || entry.at("below").is_null() == bounded) {
            throw damaged("the values of " + text(spec) + " are " + entry.dump());
        }
        if (bounded) {
            values.below = whole(entry.at("below"), 1, std::int64_t{1} << 53, "what the values of an input are below");
        }
        if (!is_float) {
            constexpr double infinity = std::numeric_limits<double>::infinity();
            const bool ids = values.kind == "ids";
            values.least = ids ? 0 : -infinity;
            values.most = ids ? static_cast<double>(values.below - 1) : infinity;
        }
        return values;
    }

    TensorSpec parse_tensor_spec(const nlohmann::json& entry) const {
        TensorSpec spec;
        spec.name = entry.at("name").get<std::string>();
        const std::string dtype = entry.at("dtype").get<std::string>();
        const auto type =
            std::find_if(kTypes.begin(), kTypes.end(), [&](const Type& each) { return dtype == each.name; });
        if (type == kTypes.end()) throw damaged("'" + spec.name + "' holds '" + dtype + "', which no tensor does");
        spec.type = type->code;
        for (const nlohmann::json& size : entry.at("shape")) {
            const std::string place = "a size of '" + spec.name + "'";
            if (size == "") throw damaged(place + " is a text of no letters");
            spec.shape.push_back(size.is_string() ? Size{0, size.get<std::string>()}
                                                  : Size{whole(size, 1, std::int64_t{1} << 40, place), ""});
        }
        return spec;
    }

    /// A path of the manifest, which may have been written to lead elsewhere.
    std::string inside(const std::string& name) const {
        bool sound = !name.empty() && name.front() != '/' && name.find_first_of("\\:") == std::string::npos &&
                     ("/" + name + "/").find("/../") == std::string::npos;
        for (const char letter : name) sound = sound && letter >= ' ' && letter <= '~';
        if (!sound) throw damaged("the path " + nlohmann::json(name).dump() + " leaves the bundle");
        return name;
    }

    std::string place_;
};

}  // namespace edifice
