// Checks that a bundle gives the same numbers here as where it was built, and measures how long it takes.
//
//   self_check [BUNDLE=../bundle] [--provider NAME=cpu] [--threads N=1] [--frames N=10000] [--json]
//
// Exit status: 0 all right; 1 a check failed; 2 the request was wrong.
#include <chrono>
#include <cstdio>
#include <functional>
#include <iostream>
#include <limits>
#include <random>

#include "edifice.hpp"

namespace fs = std::filesystem;
using edifice::Bundle, edifice::CheckError, edifice::Model, edifice::RequestError, edifice::Stream;

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

// How far numbers are off: max|found - expected| / max(1, max|expected|).
double difference(const float* found, const float* expected, std::size_t size) {
    double largest = 1, furthest = 0;
    for (std::size_t i = 0; i < size; ++i) {
        if (std::isfinite(found[i]) != std::isfinite(expected[i])) return kInfinity;
        if (!std::isfinite(expected[i])) continue;
        largest = std::max(largest, std::abs(double{expected[i]}));
        furthest = std::max(furthest, std::abs(double{found[i]} - double{expected[i]}));
    }
    return furthest / largest;
}

double difference(const Ort::Value& found, const Ort::Value& expected) {
    const auto here = found.GetTensorTypeAndShapeInfo(), there = expected.GetTensorTypeAndShapeInfo();
    if (here.GetElementType() != there.GetElementType() || here.GetShape() != there.GetShape()) return kInfinity;
    const std::size_t size = there.GetElementCount();
    if (there.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
        return difference(found.GetTensorData<float>(), expected.GetTensorData<float>(), size);
    }
    const auto *a = found.GetTensorData<std::int64_t>(), *b = expected.GetTensorData<std::int64_t>();
    return std::equal(a, a + size, b) ? 0 : kInfinity;
}

// Runs a graph on its test data, with the bare session: every input as it was recorded, every output compared.
GraphReport check_graph(Model& model, const std::string& name) {
    const edifice::GraphSpec& graph = model.bundle().graph(name);
    GraphReport report;
    report.name = name;
    std::vector<const char*> inputs, outputs;
    for (const edifice::TensorSpec& spec : graph.inputs) inputs.push_back(spec.name.c_str());
    for (const edifice::TensorSpec& spec : graph.outputs) outputs.push_back(spec.name.c_str());
    for (const std::string& folder : graph.test_data) {
        std::vector<Ort::Value> values;
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            values.push_back(model.bundle().tensor(folder + "/input_" + std::to_string(i) + ".pb"));
        }
        std::vector<Ort::Value> found;
        try {
            found = model.session(name)->Run(Ort::RunOptions{nullptr}, inputs.data(), values.data(), values.size(),
                                             outputs.data(), outputs.size());
        } catch (const Ort::Exception& error) {
            throw CheckError("ONNX Runtime failed on " + folder + " with provider " + model.options().provider + ": " +
                             error.what());
        }
        for (std::size_t i = 0; i < outputs.size(); ++i) {
            const Ort::Value expected = model.bundle().tensor(folder + "/output_" + std::to_string(i) + ".pb");
            report.error = std::max(report.error, difference(found[i], expected));
            ++report.tensors;
        }
    }
    return report;
}

// Recorded frames through a Stream from its start: by step, and all at once by prefill.
void check_sequence(Model& model, const std::string& folder, GraphReport& by_step, GraphReport& by_prefill) {
    const Ort::Value recorded = model.bundle().tensor(folder + "/input_0.pb");
    const Ort::Value expected = model.bundle().tensor(folder + "/output_0.pb");
    const edifice::Shape shape = recorded.GetTensorTypeAndShapeInfo().GetShape();
    const edifice::Shape result = expected.GetTensorTypeAndShapeInfo().GetShape();
    const edifice::GraphSpec& graph = model.bundle().graph("stream");
    const auto sound = [&](const Ort::Value& value, const edifice::TensorSpec& spec) {
        const auto info = value.GetTensorTypeAndShapeInfo();
        return info.GetElementType() == spec.type && info.GetShape() == edifice::Shape{1, shape[1], spec.shape.back()};
    };
    if (shape.size() != 3 || !sound(recorded, graph.inputs[0]) || !sound(expected, graph.outputs[0])) {
        throw CheckError(folder + " has frames " + edifice::text(shape) + " and outputs " + edifice::text(result) +
                         ", and should have [1, frames, width] of both; build the bundle again");
    }
    const auto frames = static_cast<std::size_t>(shape[1]), width = static_cast<std::size_t>(shape[2]);
    const auto hidden = static_cast<std::size_t>(result[2]);
    const float *in = recorded.GetTensorData<float>(), *out = expected.GetTensorData<float>();
    Stream stream(model);
    for (std::size_t i = 0; i < frames; ++i) {
        const std::vector<float>& found = stream.step(in + i * width, width);
        by_step.error = std::max(by_step.error, difference(found.data(), out + i * hidden, hidden));
    }
    stream.reset();
    const std::vector<float>& last = stream.prefill(std::vector<float>(in, in + frames * width), shape[1]);
    by_prefill.error = std::max(by_prefill.error, difference(last.data(), out + (frames - 1) * hidden, hidden));
    ++by_step.tensors, ++by_prefill.tensors;
}

std::vector<float> random_frames(std::size_t size, std::mt19937& random) {
    std::normal_distribution<float> normal;
    std::vector<float> numbers(size);
    for (float& number : numbers) number = normal(random);
    return numbers;
}

// Goes on from a moment, comes back to it by a snapshot and by rewind, goes on again: the outputs are the same bits.
void check_rollback(Stream& stream, std::size_t width, std::mt19937& random, Report& report) {
    const auto steps = [&](const std::vector<std::vector<float>>& frames) {
        std::vector<std::vector<float>> outputs;
        for (const std::vector<float>& frame : frames) outputs.push_back(stream.step(frame));
        return outputs;
    };
    const auto draw = [&](std::size_t most) {
        std::vector<std::vector<float>> frames(std::uniform_int_distribution<std::size_t>(1, most)(random));
        for (std::vector<float>& frame : frames) frame = random_frames(width, random);
        return frames;
    };
    const auto same_bits = [](const std::vector<std::vector<float>>& a, const std::vector<std::vector<float>>& b) {
        return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& one, const auto& other) {
            return std::memcmp(one.data(), other.data(), one.size() * sizeof(float)) == 0;
        });
    };
    edifice::Snapshot mark;
    for (int i = 0; i < kRollbacks; ++i) {
        steps(draw(10));
        stream.snapshot(mark);
        const auto frames = draw(stream.history());
        const auto outputs = steps(frames);
        stream.rewind(frames.size());
        const bool rewound = same_bits(steps(frames), outputs);
        steps(draw(2 * stream.history()));  // so that the history may have lost the moment
        stream.restore(mark);
        const bool restored = same_bits(steps(frames), outputs);
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
    throw CheckError("a frame that is one number too wide was taken; it must be refused");
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

Report check(Model& model, int frame_count) {
    const Bundle& bundle = model.bundle();
    const std::int64_t window_size = bundle.window_size;
    const int windows = std::max(20, frame_count / 50);
    Report report;
    std::mt19937 random(1);
    if (bundle.has("window")) {
        const std::size_t width = bundle.graph("window").inputs[0].width();
        const auto window = random_frames(static_cast<std::size_t>(window_size) * width, random);
        GraphReport graph = check_graph(model, "window");
        graph.milliseconds = measure(windows, [&](int) { model.run(window, 1, window_size); });
        report.graphs.push_back(graph);
        report.refused = refusal([&] { model.run(std::vector<float>(width + 1), 1, 1); });
    }
    if (bundle.has("stream")) {
        const edifice::GraphSpec& spec = bundle.graph("stream");
        const std::size_t width = spec.inputs[0].width();
        GraphReport by_step = check_graph(model, "stream"), by_prefill = check_graph(model, "prefill");
        if (spec.test_sequence) check_sequence(model, *spec.test_sequence, by_step, by_prefill);
        Stream stream(model);
        check_rollback(stream, width, random, report);
        report.refused = refusal([&] { stream.step(std::vector<float>(width + 1)); });
        stream.reset();
        const auto frames = random_frames(64 * width, random);
        by_step.milliseconds = measure(
            frame_count, [&](int i) { stream.step(frames.data() + static_cast<std::size_t>(i % 64) * width, width); });
        const auto history = random_frames(static_cast<std::size_t>(window_size) * width, random);
        by_prefill.milliseconds = measure(windows, [&](int) { stream.prefill(history, window_size); });
        report.graphs.push_back(by_step);
        report.graphs.push_back(by_prefill);
    }
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
                                     {"architecture", model.bundle().architecture},
                                     {"rollbacks", report.rollbacks},
                                     {"refused", report.refused},
                                     {"graphs", graphs},
                                     {"ok", report.failures.empty()}};
    std::printf("%s\n", all.dump(-1, ' ', true).c_str());  // ASCII: names of a bundle may be anything
}

void print_table(const Model& model, const Report& report) {
    std::printf("%s on %s, ONNX Runtime %s\n", edifice::printable(model.bundle().architecture).c_str(),
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
#else
int main(int count, char** words) {
#endif
    return self_check(std::vector<fs::path>(words + std::min(count, 1), words + count));
}
