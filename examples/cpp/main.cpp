// Checks that a bundle gives the same numbers here as where it was built, and measures how long it takes.
//
//   self_check [BUNDLE=../bundle] [--provider NAME=cpu] [--threads N=1] [--frames N=10000] [--json]
//
// Exit status: 0 all right; 1 a check failed; 2 the request was wrong.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <iostream>
#include <limits>
#include <random>

#include "edifice.hpp"
#ifdef _WIN32
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#endif

namespace fs = std::filesystem;
using edifice::Bundle, edifice::CheckError, edifice::Model, edifice::Numbers, edifice::RequestError, edifice::Stream;
using edifice::Tensor;

namespace {

constexpr char kUsage[] = "self_check [BUNDLE] [--provider NAME] [--threads N] [--frames N] [--json]";
constexpr int kRollbacks = 20;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Arguments {
    fs::path bundle = fs::path("..") / "bundle";
    edifice::Options options;
    int frames = 10'000;
    bool json = false;
};

struct GraphReport {
    std::string name;
    int tensors = 0;
    double error = 0;                  // the largest of them
    std::vector<double> milliseconds;  // sorted

    double percentile(double part) const {
        return milliseconds[static_cast<std::size_t>(std::ceil(part * static_cast<double>(milliseconds.size()))) - 1];
    }
};

struct Report {
    std::vector<GraphReport> graphs;
    int rollbacks = 0;
    std::string refused;
    std::vector<std::string> failures;
};

int positive(const std::string& option, const std::string& value) {
    const bool digits = !value.empty() && value.size() < 9 && value.find_first_not_of("0123456789") == value.npos;
    if (!digits || std::stoi(value) < 1) throw RequestError(option + " '" + value + "': give a whole number from 1");
    return std::stoi(value);
}

Arguments parse(const std::vector<fs::path>& given) {
    Arguments arguments;
    bool named = false;
    for (std::size_t i = 0; i < given.size(); ++i) {
        const std::string word = edifice::text(given[i]);
        const auto value = [&] {
            if (++i == given.size()) throw RequestError(word + " lacks its value; usage: " + kUsage);
            return edifice::text(given[i]);
        };
        if (word == "--provider") {
            arguments.options.provider = value();
        } else if (word == "--threads") {
            arguments.options.threads = positive(word, value());
        } else if (word == "--frames") {
            arguments.frames = positive(word, value());
        } else if (word == "--json") {
            arguments.json = true;
        } else if (word.rfind('-', 0) == 0) {
            throw RequestError("unknown option '" + word + "'; usage: " + kUsage);
        } else if (named) {
            throw RequestError("'" + word + "' is a second bundle; usage: " + kUsage);
        } else {
            arguments.bundle = given[i];
            named = true;
        }
    }
    return arguments;
}

// How far numbers are off: max|found - expected| / max(1, max|expected|). Those that are no floats have to be the same.
double difference(const Numbers& found, const Numbers& expected) {
    if (found.type != expected.type || found.size != expected.size) return kInfinity;
    return edifice::with_type(found.type, [&](auto zero) {
        const auto* const here = static_cast<const decltype(zero)*>(found.data);
        const auto* const there = static_cast<const decltype(zero)*>(expected.data);
        double largest = 1, furthest = 0;
        for (std::size_t i = 0; i < found.size; ++i) {
            const double one = edifice::to_double(here[i]), other = edifice::to_double(there[i]);
            if (std::is_integral_v<decltype(zero)> && here[i] != there[i]) return kInfinity;
            if (std::isfinite(one) != std::isfinite(other)) return kInfinity;
            if (!std::isfinite(other)) continue;
            largest = std::max(largest, std::abs(other));
            furthest = std::max(furthest, std::abs(one - other));
        }
        return furthest / largest;
    });
}

Tensor recorded(const Bundle& bundle, const std::string& folder, const std::string& kind, std::size_t index) {
    return bundle.tensor(folder + "/" + kind + "_" + std::to_string(index) + ".pb");
}

// Runs a graph on its test data: every input as it was recorded, every output compared.
GraphReport check_graph(Model& model, const std::string& name) {
    const edifice::GraphSpec& graph = model.bundle().graph(name);
    GraphReport report;
    report.name = name;
    for (const std::string& folder : graph.test_data) {
        std::vector<Tensor> inputs;
        for (std::size_t i = 0; i < graph.inputs.size(); ++i) {
            inputs.push_back(recorded(model.bundle(), folder, "input", i));
        }
        const std::vector<Tensor> found = model.call(name, {inputs.begin(), inputs.end()});
        for (std::size_t i = 0; i < found.size(); ++i) {
            const Tensor expected = recorded(model.bundle(), folder, "output", i);
            const double error = found[i].shape() == expected.shape() ? difference(found[i], expected) : kInfinity;
            report.error = std::max(report.error, error);
            ++report.tensors;
        }
    }
    return report;
}

// Recorded inputs or outputs of a stream, each [batch, frames, ...].
std::vector<Tensor> recorded_frames(const Bundle& bundle, const std::string& folder, const std::string& kind,
                                    const std::vector<edifice::TensorSpec>& specs) {
    std::vector<Tensor> tensors;
    for (const edifice::TensorSpec& spec : specs) {
        const Tensor& tensor = tensors.emplace_back(recorded(bundle, folder, kind, tensors.size()));
        const edifice::Shape &shape = tensor.shape(), &first = tensors[0].shape();
        bool sound = tensor.type() == spec.type && std::min(shape.size(), first.size()) > 1;
        if (sound) {
            edifice::Shape expected = spec.at({{spec.shape[0].free, first[0]}});
            expected.insert(expected.begin() + 1, first[1]);
            sound = shape == expected;
        }
        if (!sound) {
            throw CheckError(folder + " has " + kind + " " + edifice::text(shape) + ", and should have frames of " +
                             edifice::text(spec) + "; build the bundle again");
        }
    }
    return tensors;
}

// One frame of a tensor [batch, frames, ...].
Tensor frame_of(const Tensor& tensor, std::int64_t frame) {
    edifice::Shape shape = tensor.shape();
    const auto batch = static_cast<std::size_t>(shape[0]), frames = static_cast<std::size_t>(shape[1]);
    shape.erase(shape.begin() + 1);
    Tensor result(tensor.type(), shape);
    const std::size_t size = result.byte_size() / batch;
    for (std::size_t entry = 0; entry < batch; ++entry) {
        std::memcpy(
            static_cast<char*>(result.bytes()) + entry * size,
            static_cast<const char*>(tensor.bytes()) + (entry * frames + static_cast<std::size_t>(frame)) * size, size);
    }
    return result;
}

std::vector<Tensor> frames_of(const std::vector<Tensor>& tensors, std::int64_t frame) {
    std::vector<Tensor> result;
    for (const Tensor& tensor : tensors) result.push_back(frame_of(tensor, frame));
    return result;
}

std::vector<Numbers> numbers_of(const std::vector<Tensor>& tensors) { return {tensors.begin(), tensors.end()}; }

// Recorded frames through a Stream from its start: by step, and all at once by prefill.
void check_sequence(Model& model, const std::string& folder, GraphReport& by_step, GraphReport* by_prefill) {
    const edifice::GraphSpec& graph = model.bundle().graph("stream");
    const auto inputs = recorded_frames(model.bundle(), folder, "input", graph.own_inputs());
    const auto outputs = recorded_frames(model.bundle(), folder, "output", graph.own_outputs());
    const std::int64_t batch = inputs[0].shape()[0], frames = inputs[0].shape()[1];
    if (outputs[0].shape()[0] != batch || outputs[0].shape()[1] != frames) {
        throw CheckError(folder + " has inputs and outputs of other frames; build the bundle again");
    }
    const auto compare = [&](const std::vector<Tensor>& found, std::int64_t frame, GraphReport& report) {
        for (std::size_t i = 0; i < found.size(); ++i) {
            report.error = std::max(report.error, difference(found[i], frame_of(outputs[i], frame)));
        }
    };
    Stream stream(model, batch);
    for (std::int64_t i = 0; i < frames; ++i) {
        compare(stream.step(numbers_of(frames_of(inputs, i))), i, by_step);
    }
    by_step.tensors += static_cast<int>(outputs.size());
    if (by_prefill == nullptr) return;
    stream.reset();
    compare(stream.prefill(frames, numbers_of(inputs)), frames - 1, *by_prefill);
    by_prefill->tensors += static_cast<int>(outputs.size());
}

// An input of the kind that the manifest says.
Tensor draw(const edifice::TensorSpec& spec, const edifice::Sizes& sizes, std::mt19937& random) {
    const edifice::Shape shape = spec.at(sizes);
    edifice::count(shape);  // which may be too large
    Tensor tensor(spec.type, shape);
    const std::size_t width = shape.empty() ? 1 : static_cast<std::size_t>(shape.back());
    std::normal_distribution<double> normal;
    std::uniform_int_distribution<std::int64_t> whole(0, std::max<std::int64_t>(0, spec.values.below - 1));
    std::uniform_int_distribution<std::size_t> place(0, width - 1);
    std::size_t last = 0;
    const auto next = [&](std::size_t i) {
        if (spec.values.kind == "normal") return normal(random);
        if (spec.values.kind != "mask") return static_cast<double>(whole(random));
        if (i % width == 0) last = place(random);
        return i % width <= last ? 1.0 : 0.0;
    };
    edifice::with_type(spec.type, [&](auto zero) {
        using T = decltype(zero);
        T* const numbers = tensor.data<T>();
        for (std::size_t i = 0; i < tensor.size(); ++i) {
            if constexpr (std::is_arithmetic_v<T>) {
                numbers[i] = static_cast<T>(next(i));
            } else {
                numbers[i] = T(static_cast<float>(next(i)));
            }
        }
    });
    return tensor;
}

std::vector<Tensor> draw(const std::vector<edifice::TensorSpec>& specs, const edifice::Sizes& sizes,
                         std::mt19937& random) {
    std::vector<Tensor> tensors;
    for (const edifice::TensorSpec& spec : specs) tensors.push_back(draw(spec, sizes, random));
    return tensors;
}

// Goes on from a moment, comes back to it by a snapshot and by rewind, goes on again: the outputs are the same bits.
void check_rollback(Stream& stream, const std::vector<edifice::TensorSpec>& inputs, const edifice::Sizes& sizes,
                    std::mt19937& random, Report& report) {
    using Frames = std::vector<std::vector<Tensor>>;
    const auto steps = [&](const Frames& frames) {
        std::string outputs;
        for (const std::vector<Tensor>& frame : frames) {
            for (const Tensor& output : stream.step(numbers_of(frame))) {
                outputs.append(static_cast<const char*>(output.bytes()), output.byte_size());
            }
        }
        return outputs;
    };
    const auto draw_frames = [&](std::size_t most) {
        Frames frames(std::uniform_int_distribution<std::size_t>(1, most)(random));
        for (std::vector<Tensor>& frame : frames) frame = draw(inputs, sizes, random);
        return frames;
    };
    edifice::Snapshot mark;
    for (int i = 0; i < kRollbacks; ++i) {
        steps(draw_frames(10));
        stream.snapshot(mark);
        const Frames frames = draw_frames(stream.history());
        const std::string outputs = steps(frames);
        stream.rewind(frames.size());
        const bool rewound = steps(frames) == outputs;
        steps(draw_frames(2 * stream.history()));  // so that the history may have lost the moment
        stream.restore(mark);
        const bool restored = steps(frames) == outputs;
        if (!rewound || !restored) {
            report.failures.push_back("rollback " + std::to_string(i + 1) + ": " + (rewound ? "restore" : "rewind") +
                                      " gave other outputs for the same " + std::to_string(frames.size()) +
                                      " frames; don't roll back with this provider");
            return;
        }
        ++report.rollbacks;
    }
}

std::string refusal(const std::function<void()>& call) {
    try {
        call();
    } catch (const RequestError& error) {
        return error.what();
    }
    throw CheckError("an input that is one number short was taken; it must be refused");
}

std::vector<double> measure(int times, const std::function<void(int)>& call) {
    using Clock = std::chrono::steady_clock;
    call(0);  // the first allocates
    std::vector<double> milliseconds;
    for (int i = 0; i < times; ++i) {
        const Clock::time_point start = Clock::now();
        call(i);
        milliseconds.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
    }
    std::sort(milliseconds.begin(), milliseconds.end());
    return milliseconds;
}

void check_window(Model& model, int windows, std::mt19937& random, Report& report) {
    const edifice::GraphSpec& graph = model.bundle().graph("window");
    report.graphs.push_back(check_graph(model, "window"));
    const std::vector<Tensor> drawn = draw(graph.inputs, model.bundle().sizes, random);
    std::vector<edifice::Input> inputs(drawn.begin(), drawn.end());
    report.graphs.back().milliseconds = measure(windows, [&](int) { model(inputs); });
    --inputs[0].numbers.size;
    report.refused = refusal([&] { model(inputs); });
}

void check_stream(Model& model, int frame_count, int windows, std::mt19937& random, Report& report) {
    const Bundle& bundle = model.bundle();
    const edifice::GraphSpec& graph = bundle.graph("stream");
    const std::vector<edifice::TensorSpec> specs = graph.own_inputs();
    const bool has_prefill = bundle.has("prefill");
    GraphReport by_step = check_graph(model, "stream"), by_prefill;
    if (has_prefill) by_prefill = check_graph(model, "prefill");
    if (graph.test_sequence) check_sequence(model, *graph.test_sequence, by_step, has_prefill ? &by_prefill : nullptr);
    Stream stream(model, bundle.sizes.at(specs[0].shape[0].free));
    check_rollback(stream, specs, bundle.sizes, random, report);
    std::vector<std::vector<Tensor>> frames;
    std::vector<std::vector<Numbers>> inputs;
    for (int i = 0; i < 64; ++i) {
        frames.push_back(draw(specs, bundle.sizes, random));
        inputs.push_back(numbers_of(frames.back()));
    }
    std::vector<Numbers> narrow = inputs[0];
    --narrow[0].size;
    report.refused = refusal([&] { stream.step(narrow); });
    stream.reset();
    const bool grows = std::any_of(bundle.states.begin(), bundle.states.end(), [](const auto& each) { return each.grows(); });
    // Each call is that after a window's frames, then; going back copies nothing.
    for (std::int64_t i = 0; grows && i < bundle.window_size(); ++i) stream.step(inputs[0]);
    by_step.milliseconds = measure(frame_count, [&](int i) {
        stream.step(inputs[static_cast<std::size_t>(i % 64)]);
        if (grows) stream.rewind(1);
    });
    report.graphs.push_back(by_step);
    if (!has_prefill) return;
    const std::vector<Tensor> history = draw(bundle.graph("prefill").own_inputs(), bundle.sizes, random);
    const std::vector<Numbers> numbers = numbers_of(history);
    by_prefill.milliseconds = measure(windows, [&](int) {
        stream.prefill(bundle.window_size(), numbers);
        if (grows) stream.rewind(1);
    });
    report.graphs.push_back(by_prefill);
}

Report check(Model& model, int frame_count) {
    const int windows = std::max(20, frame_count / 50);
    Report report;
    std::mt19937 random(1);
    if (model.bundle().has("window")) check_window(model, windows, random, report);
    if (model.bundle().has("stream")) check_stream(model, frame_count, windows, random, report);
    const double limit = model.options().provider == "webgpu" ? 1e-3 : 1e-5;
    for (const GraphReport& graph : report.graphs) {
        if (graph.error <= limit) continue;
        char numbers[64];
        std::snprintf(numbers, sizeof numbers, "%.1e, and the limit is %.0e", graph.error, limit);
        report.failures.push_back("graph " + graph.name + ": the error is " + numbers +
                                  "; don't use this bundle with provider " + model.options().provider + " here");
    }
    return report;
}

void print_json(const Model& model, const Report& report) {
    nlohmann::ordered_json graphs = nlohmann::ordered_json::array();
    for (const GraphReport& graph : report.graphs) {
        graphs.push_back({{"graph", graph.name},
                          {"tensors", graph.tensors},
                          {"error", graph.error},  // null if infinite
                          {"p50_ms", graph.percentile(0.5)},
                          {"p99_ms", graph.percentile(0.99)},
                          {"max_ms", graph.milliseconds.back()}});
    }
    const nlohmann::ordered_json all{{"language", "cpp"},
                                     {"runtime", Ort::GetVersionString()},
                                     {"provider", model.options().provider},
                                     {"program", model.bundle().program},
                                     {"rollbacks", report.rollbacks},
                                     {"refused", report.refused},
                                     {"graphs", graphs},
                                     {"ok", report.failures.empty()}};
    std::printf("%s\n", all.dump(-1, ' ', true).c_str());  // ASCII: names of a bundle may be anything
}

void print_table(const Model& model, const Report& report) {
    std::printf("%s on %s, ONNX Runtime %s\n", edifice::printable(model.bundle().program).c_str(),
                model.options().provider.c_str(), Ort::GetVersionString().c_str());
    std::printf("%-8s  %7s  %8s  %8s  %8s  %8s\n", "graph", "tensors", "error", "p50 ms", "p99 ms", "max ms");
    for (const GraphReport& graph : report.graphs) {
        std::printf("%-8s  %7d  %8.1e  %8.3f  %8.3f  %8.3f\n", graph.name.c_str(), graph.tensors, graph.error,
                    graph.percentile(0.5), graph.percentile(0.99), graph.milliseconds.back());
    }
    std::printf("rollbacks with bitwise the same outputs: %d\nrefused: %s\n%s\n", report.rollbacks,
                report.refused.c_str(), report.failures.empty() ? "ok" : "FAILED");
}

int fail(const std::string& message, int status) {
    std::cerr << "error: " << edifice::printable(message) << "\n";
    return status;
}

int self_check(const std::vector<fs::path>& given) {
    try {
        const Arguments arguments = parse(given);
        const Bundle bundle(arguments.bundle);
        bundle.check_files();
        Model model(bundle, arguments.options);
        const Report report = check(model, arguments.frames);
        arguments.json ? print_json(model, report) : print_table(model, report);
        return report.failures.empty() ? 0 : fail(report.failures.front(), 1);
    } catch (const RequestError& error) {
        return fail(error.what(), 2);
    } catch (const std::exception& error) {
        return fail(error.what(), 1);
    }
}

}  // namespace

#ifdef _WIN32
int wmain(int count, wchar_t** words) {  // main's narrow characters can't name every folder
    SetConsoleOutputCP(CP_UTF8);  // of what is printed
#else
int main(int count, char** words) {
#endif
    return self_check(std::vector<fs::path>(words + std::min(count, 1), words + count));
}
