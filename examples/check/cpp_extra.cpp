// Checks of edifice.hpp that are not for a reader: SHA-256, damaged input, allocations. Built in place of main.cpp.
#define ORT_API_MANUAL_INIT  // so that calls of ONNX Runtime can be seen

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <new>
#include <random>

#include "edifice.hpp"

namespace {

bool counting = false, in_runtime = false;
long ours = 0, of_runtime = 0;

void count_allocation() {
    if (counting) ++(in_runtime ? of_runtime : ours);
}

const OrtApi* runtime = nullptr;

OrtStatus* ORT_API_CALL run_with_binding(OrtSession* session, const OrtRunOptions* options,
                                         const OrtIoBinding* binding) noexcept {
    in_runtime = true;
    OrtStatus* const status = runtime->RunWithBinding(session, options, binding);
    in_runtime = false;
    return status;
}

// Digests of byte i * 7 for every length up to 300, fed in pieces; then of a million times 'a'.
void sha256() {
    std::mt19937 random(1);
    std::string bytes;
    for (std::size_t length = 0; length <= 300; ++length) {
        edifice::Sha256 hash;
        for (std::size_t at = 0; at < length;) {
            const std::size_t piece = std::min<std::size_t>(1 + random() % 80, length - at);
            hash.update(bytes.data() + at, piece);
            at += piece;
        }
        std::printf("%s\n", hash.hex().c_str());
        bytes += static_cast<char>(length * 7 % 256);
    }
    for (const std::string& text : {std::string("abc"), std::string(1'000'000, 'a')}) {
        edifice::Sha256 hash;
        hash.update(text.data(), text.size());
        std::printf("%s\n", hash.hex().c_str());
    }
}

std::string read(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

bool refuses(const std::string& bytes) {
    try {
        edifice::parse_tensor(bytes, "damaged");
        return false;
    } catch (const edifice::CheckError&) {
        return true;  // any other exception ends the program
    }
}

// A tensor cut short at every place, which must be refused, and with each of its bytes changed, which must do no harm.
int tensors(const std::filesystem::path& path) {
    const std::string whole = read(path);
    for (std::size_t length = 0; length < whole.size(); ++length) {
        if (!refuses(whole.substr(0, length))) {
            std::fprintf(stderr, "a tensor of %zu bytes was taken from %zu\n", whole.size(), length);
            return 1;
        }
    }
    int refused = 0;
    for (std::size_t at = 0; at < whole.size(); ++at) {
        for (int value = 0; value < 256; ++value) {
            std::string changed = whole;
            changed[at] = static_cast<char>(value);
            refused += refuses(changed) ? 1 : 0;
        }
    }
    std::printf("%zu cut short and all refused; %zu with a byte changed, %d refused\n", whole.size(),
                whole.size() * 256, refused);
    return 0;
}

// Manifests with bytes changed or taken out: each is read or refused.
void manifests(const std::filesystem::path& folder) {
    const std::string whole = read(folder / "manifest.json");
    std::mt19937 random(1);
    int refused = 0;
    constexpr int tries = 2000;
    for (int i = 0; i < tries; ++i) {
        std::string changed = whole;
        const std::size_t at = random() % whole.size();
        if (i % 2 == 0) {
            changed[at] = static_cast<char>(random() % 256);
        } else {
            changed.erase(at, random() % 40);
        }
        std::ofstream(folder / "manifest.json", std::ios::binary) << changed;
        try {
            edifice::Bundle{folder};
        } catch (const edifice::Error&) {
            ++refused;
        }
    }
    std::ofstream(folder / "manifest.json", std::ios::binary) << whole;
    std::printf("%d with bytes changed or taken out, %d refused\n", tries, refused);
}

// A stream on a bundle that is damaged: it is refused, with what the caller expects to read.
int opening(const std::filesystem::path& folder, const std::string& expected) {
    try {
        edifice::Model model{edifice::Bundle{folder}};
        edifice::Stream stream(model);
    } catch (const edifice::CheckError& error) {
        std::printf("%s\n", error.what());
        return std::string(error.what()).find(expected) == std::string::npos;
    }
    std::printf("it was opened\n");
    return 1;
}

// Whether versions of ONNX Runtime are refused.
int runtimes() {
    for (const char* version : {"1.24.1", "1.100.0", "2.0.0"}) edifice::check_runtime(version);
    for (const std::string version : {"1.23.2", "1.9.0", "0.25.0", "1.23.0-dev", "unknown"}) {
        try {
            edifice::check_runtime(version);
            std::printf("%s was not refused\n", version.c_str());
            return 1;
        } catch (const edifice::RequestError& error) {
            const std::string expected = "ONNX Runtime " + version + " is older than 1.24";
            if (std::string(error.what()).find(expected) != 0) return 1;
        }
    }
    return 0;
}

// A kernel that is registered under a body's name goes before the body: it is called, and what it gives comes out.
struct Kernel {
    static inline int calls = 0;
    void Compute(OrtKernelContext* context) {
        ++calls;
        const Ort::KernelContext given(context);
        const auto x = given.GetInput(0), initial = given.GetInput(5);
        for (const auto& [index, like] : {std::pair{0, x}, std::pair{1, initial}}) {
            const auto shape = like.GetTensorTypeAndShapeInfo().GetShape();
            auto output = Ort::KernelContext(context).GetOutput(static_cast<std::size_t>(index), shape);
            std::fill_n(output.GetTensorMutableData<float>(), edifice::count(shape), 0.25f);
        }
    }
};

struct KernelOp : Ort::CustomOpBase<KernelOp, Kernel> {
    void* CreateKernel(const OrtApi&, const OrtKernelInfo*) const { return new Kernel; }
    const char* GetName() const { return "SelectiveScan_frame_6to2"; }
    std::size_t GetInputTypeCount() const { return 6; }
    std::size_t GetOutputTypeCount() const { return 2; }
    ONNXTensorElementDataType GetInputType(std::size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
    ONNXTensorElementDataType GetOutputType(std::size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
};

int kernel(const std::filesystem::path& model) {
    const KernelOp op;
    Ort::CustomOpDomain domain("edifice");
    domain.Add(&op);
    Ort::SessionOptions options;
    options.Add(domain);
    const Ort::Env env(ORT_LOGGING_LEVEL_FATAL);
    Ort::Session session(env, model.c_str(), options);
    Ort::AllocatorWithDefaultOptions allocator;
    std::vector<std::string> names;
    std::vector<const char*> inputs, outputs;
    std::vector<Ort::Value> values;
    for (std::size_t i = 0; i < session.GetInputCount() + session.GetOutputCount(); ++i) {
        const bool reads = i < session.GetInputCount();
        names.emplace_back(reads ? session.GetInputNameAllocated(i, allocator).get()
                                 : session.GetOutputNameAllocated(i - session.GetInputCount(), allocator).get());
    }
    for (std::size_t i = 0; i < names.size(); ++i) {
        (i < session.GetInputCount() ? inputs : outputs).push_back(names[i].c_str());
    }
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        const auto type = session.GetInputTypeInfo(i);
        const auto info = type.GetTensorTypeAndShapeInfo();
        auto shape = info.GetShape();
        std::replace(shape.begin(), shape.end(), std::int64_t{-1}, std::int64_t{1});
        values.push_back(Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), info.GetElementType()));
        const bool is_float = info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        std::memset(values[i].GetTensorMutableRawData(), 0, edifice::count(shape) * (is_float ? 4 : 8));
    }
    const auto results = session.Run(Ort::RunOptions{nullptr}, inputs.data(), values.data(), values.size(),
                                     outputs.data(), outputs.size());
    int quarters = 0;
    for (std::size_t i = 0; i < outputs.size(); ++i) {
        if (names[inputs.size() + i].find(".ssm") == std::string::npos) continue;
        quarters += *results[i].GetTensorData<float>() == 0.25f;
    }
    std::printf("%d %d\n", Kernel::calls, quarters);
    return 0;
}

// Whether a call is refused as a request, in these words.
bool refuses_with(const std::function<void()>& call, const std::string& words) {
    try {
        call();
    } catch (const edifice::RequestError& error) {
        if (std::string(error.what()).find(words) != std::string::npos) return true;
        std::fprintf(stderr, "expected '%s', got: %s\n", words.c_str(), error.what());
        return false;
    }
    std::fprintf(stderr, "not refused with '%s'\n", words.c_str());
    return false;
}

std::size_t width_of(const edifice::Model& model) {
    return static_cast<std::size_t>(model.bundle().graph("stream").inputs[0].shape.back().number);
}

std::vector<float> floats(const edifice::Tensor& tensor) {
    return {tensor.data<float>(), tensor.data<float>() + tensor.size()};
}

// Frames that no model takes leave the stream as it was, and escape codes reach no terminal.
int magnitudes(const std::filesystem::path& folder) {
    edifice::Model model{edifice::Bundle{folder}};
    edifice::Stream stream(model), plain(model);
    const std::size_t width = width_of(model);
    const auto frame = [&](float value) { return std::vector<float>(width, value); };
    stream.step(frame(0.5f)), plain.step(frame(0.5f));
    int refused = 0;
    for (const float value : {3.4e38f, -3.4e38f, 1e30f, 1e19f, -1e18f, 1.001e12f, INFINITY, NAN}) {
        const std::string limit = std::isfinite(value) ? "numbers up to 1e12" : "give finite numbers only";
        std::vector<float> numbers(3 * width, 1.0f);
        numbers[2 * width + 1] = value;
        const edifice::Numbers last(numbers.data() + 2 * width, width);
        refused += refuses_with([&] { stream.step(last); }, " at [0, 1]; " + limit) ? 1 : 0;
        refused += refuses_with([&] { stream.prefill(3, numbers); }, " at [0, 2, 1]; " + limit) ? 1 : 0;
        const edifice::Shape shape{1, 3, static_cast<std::int64_t>(width)};
        refused += refuses_with([&] { model({{numbers, shape}}); }, " at [0, 2, 1]; " + limit) ? 1 : 0;
    }
    const bool same =
        stream.rewindable() == 1 && floats(stream.step(frame(0.25f))[0]) == floats(plain.step(frame(0.25f))[0]);
    stream.step(frame(static_cast<float>(edifice::kMaxMagnitude)));
    const std::string letters = " gr\xc3\xb6\xc3\x9f \xe4\xb8\x80";
    const std::string shown = edifice::printable("a\x1b[2J\x7f\n\xc2\x9b\xe2\x80\xae\xff" + letters);
    const bool plain_text = shown == "a\\x1b[2J\\x7f \\x9b\\u{202e}\\xff" + letters;
    std::printf("%d of 24 frames and windows that are too large are refused\n", refused);
    if (refused == 24 && same && plain_text) return 0;
    std::fprintf(stderr, "refused %d, went on the same %d, printable %s\n", refused, same, shown.c_str());
    return 1;
}

// A stream on a bundle whose outputs overflow: none is handed out, and the stream stays where it was.
int overflow(const std::filesystem::path& folder) {
    edifice::Model model{edifice::Bundle{folder}};
    edifice::Stream stream(model);
    const std::vector<float> frame(width_of(model), 0.5f);
    const edifice::Shape shape{1, 1, static_cast<std::int64_t>(frame.size())};
    const std::vector<std::function<void()>> calls{[&] { model({{frame, shape}}); }, [&] { stream.step(frame); },
                                                   [&] { stream.prefill(1, frame); }};
    for (const auto& call : calls) {
        try {
            call();
            return 1;
        } catch (const edifice::CheckError& error) {
            if (std::string(error.what()).find("output is not finite") == std::string::npos) return 1;
        }
    }
    return stream.rewindable() == 0 ? 0 : 1;
}

// Windows of handmade.py's bundle: what comes out by name and in order, and what is not taken.
bool handmade_window(edifice::Model& model) {
    std::vector<float> signal(12, 1.0f);  // of two entries with two frames
    const std::vector<float> offset{0.5f, -0.25f, 0.0f};
    std::vector<std::int64_t> kinds{4, 0, 1, 2};
    std::vector<Ort::Float16_t> gain(6, Ort::Float16_t(2.0f));
    const std::array<bool, 4> mask{false, true, true, true};
    std::vector<std::int32_t> codes{4, 0, 1, 2, 3, 1};
    const std::vector<std::int32_t> level{3};
    const std::vector<std::int64_t> wide(6);
    const std::vector<double> doubles(4);
    using Inputs = std::map<std::string, edifice::Input>;
    const Inputs inputs{{"signal", {signal, {2, 2, 3}}}, {"kinds", {kinds, {2, 2}}}, {"gain", {gain, {2, 3}}},
                        {"mask", {mask, {2, 2}}},        {"codes", {codes, {2, 3}}}, {"level", {level, {}}},
                        {"offset", {offset, {3}}}};
    const auto named = model.run(inputs);
    const auto ordered = model({{signal, {2, 2, 3}},
                                {kinds, {2, 2}},
                                {gain, {2, 3}},
                                {mask, {2, 2}},
                                {codes, {2, 3}},
                                {level, {}},
                                {offset, {3}}});
    bool right = named.at("sums").data<float>()[0] == 7.25f && named.at("sums").data<float>()[3] == 5.25f;
    right = right && named.at("square").data<Ort::Float16_t>()[5].ToFloat() == 4.0f;
    right = right && named.at("flags").shape() == edifice::Shape{2, 3} && !named.at("flags").data<bool>()[2];
    right = right && named.at("flags").data<bool>()[1] && named.at("flags").data<bool>()[5];
    right = right && named.at("total").shape().empty() && *named.at("total").data<float>() == 20.0f;
    right = right && *named.at("count").data<std::int64_t>() == 7 && ordered[5].data<std::int64_t>()[1] == 6;
    right = right && ordered[6].data<std::int32_t>()[0] == 8;
    right = refuses_with([&] { named.at("count").data<float>(); }, "int64 was read as float32") && right;
    right = refuses_with([&] { model({{signal, {2, 2, 3}}}); }, "; got 1 inputs") && right;

    const auto refuses = [&](const std::string& words, const std::function<void(Inputs&)>& change) {
        Inputs changed = inputs;
        change(changed);
        right = refuses_with([&] { model.run(changed); }, words) && right;
    };
    const auto refuses_shape = [&](const std::string& words, const std::string& name, const edifice::Shape& shape) {
        refuses(words, [&](Inputs& given) { given.at(name).shape = shape; });
    };
    refuses_shape("kinds: entries is 1, and 2 in what was given before", "kinds", {1, 4});
    refuses_shape("signal has shape [2, 3, 2], and the model takes signal float32 [entries, time, 3]", "signal",
                  {2, 3, 2});
    refuses_shape("signal has shape [4, 3], and the model takes", "signal", {4, 3});
    refuses_shape("mask has shape [0, 2], and the model takes", "mask", {0, 2});
    refuses_shape("level has shape [1], and the model takes", "level", {1});
    refuses_shape("signal: time is 1, and this model takes 2 or more", "signal", {4, 1, 3});
    refuses_shape("signal: time is 10, and this model takes at most 9", "signal", {1, 10, 3});
    refuses_shape("gain: width is 1, and this model takes 2 or more", "gain", {2, 1});
    refuses_shape("gain has 6 numbers, and the model takes 8 (float16 [2, 4])", "gain", {2, 4});
    refuses("codes holds int64, and the model takes int32", [&](Inputs& given) { given.at("codes").numbers = wide; });
    refuses("there are float32, float16, int64", [&](Inputs& given) { given.at("codes").numbers = doubles; });
    refuses("offset float32 [3]; got codes, gain", [](Inputs& given) { given.erase("mask"); });
    refuses("mask, more, offset, signal", [](Inputs& given) { given.emplace("more", given.at("kinds")); });
    codes[4] = 5;
    refuses("codes holds 5 at [1, 1]; there are 0 to 4, give those", [](Inputs&) {});
    codes[4] = 3;
    kinds[2] = -1;
    refuses("kinds holds -1 at [1, 0]; there are 0 to 4, give those", [](Inputs&) {});
    kinds[2] = 1;
    signal[5] = INFINITY;
    refuses("signal holds inf at [0, 1, 2]; give finite numbers only", [](Inputs&) {});
    signal[5] = 1.0f;
    gain[4] = Ort::Float16_t(INFINITY);
    refuses("gain holds inf at [1, 1]; give finite numbers only", [](Inputs&) {});
    gain[4] = Ort::Float16_t(300.0f);  // whose square is none of float16
    try {
        model.run(inputs);
    } catch (const edifice::CheckError& error) {
        return right && std::string(error.what()).find("square is not finite") == 0;
    }
    return false;
}

// Its stream: two inputs, two outputs, no prefill graph, and states that start from a file, 0.5, 7 and 3.
bool handmade_stream(edifice::Model& model) {
    edifice::Stream stream(model, 2);
    const std::vector<float> signal{1, 2, 3, 4, 5, 6}, score{5.125f, 5.9375f, 2.125f, 5.1875f};
    const std::vector<std::int64_t> kinds{4, 1}, odd{4, 5};
    const std::vector<edifice::Tensor>& found = stream.step(signal, kinds);
    bool right = found.size() == 2 && std::equal(score.begin(), score.end(), found[0].data<float>());
    right = right && found[1].data<std::int64_t>()[0] == 44 && found[1].data<std::int64_t>()[1] == 32;
    right = refuses_with([&] { stream.step(signal, odd); }, "kinds holds 5 at [1]; there are 0 to 4") && right;
    right = refuses_with([&] { stream.step(signal); }, "float32 [entries, 3], kinds int64 [entries]; got 1") && right;
    right = refuses_with([&] { stream.step(kinds, signal); }, "signal holds int64, and the model takes") && right;
    right = refuses_with([&] { stream.prefill(1, signal, kinds); }, "has no prefill graph") && right;
    right = refuses_with([&] { model.call("prefill", {}); }, "has no prefill graph") && right;
    stream.step(signal, kinds);
    stream.step(signal, kinds);  // has seen 7 and three times 4, or 1, in steps from 3
    const std::int64_t* const seen = found[1].data<std::int64_t>();
    return right && seen[0] == 19 * 6 && seen[1] == 10 * 6 && stream.rewindable() == 3;
}

int handmade(const std::filesystem::path& folder) {
    edifice::Model model{edifice::Bundle{folder}};
    if (!handmade_window(model) || !handmade_stream(model)) return 1;
    std::printf("tensors of five types, a stream of two inputs and outputs: right, and wrong calls are refused\n");
    return 0;
}

// Calls of operator new in steps, snapshots, rewinds and restores: outside of ONNX Runtime's run, and within.
void allocations(const std::filesystem::path& folder) {
    edifice::Model model{edifice::Bundle{folder}};
    edifice::Stream stream(model);
    const std::vector<float> frame(width_of(model), 0.5f);
    edifice::Snapshot mark;
    stream.step(frame);
    stream.snapshot(mark);
    constexpr int steps = 1000;
    counting = true;
    for (int i = 0; i < steps; ++i) {
        stream.step(frame);
        stream.step(frame);
        stream.rewind(1);
        if (i % 20 == 0) stream.restore(mark);
        if (i % 20 == 3) stream.snapshot(mark);
    }
    counting = false;
    std::printf("%ld %ld %d\n", ours, of_runtime, 2 * steps);
}

}  // namespace

// Not inline: compilers warn of pairs of malloc and delete where they see into only one of the two.
[[gnu::noinline]] void* operator new(std::size_t size) {
    count_allocation();
    if (void* const memory = std::malloc(size == 0 ? 1 : size)) return memory;
    throw std::bad_alloc();
}
void* operator new[](std::size_t size) { return operator new(size); }
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { operator delete(memory); }
void operator delete(void* memory, std::size_t) noexcept { operator delete(memory); }
void operator delete[](void* memory, std::size_t) noexcept { operator delete(memory); }

int main(int count, char** words) {
    runtime = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    static OrtApi watched = *runtime;
    watched.RunWithBinding = run_with_binding;
    Ort::InitApi(&watched);
    const std::string task = count > 1 ? words[1] : "";
    if (task == "sha256") sha256();
    if (task == "tensors" && count == 3) return tensors(words[2]);
    if (task == "manifests" && count == 3) manifests(words[2]);
    if (task == "runtimes") return runtimes();
    if (task == "kernel" && count == 3) return kernel(words[2]);
    if (task == "opening" && count == 4) return opening(words[2], words[3]);
    if (task == "magnitudes" && count == 3) return magnitudes(words[2]);
    if (task == "handmade" && count == 3) return handmade(words[2]);
    if (task == "overflow" && count == 3) return overflow(words[2]);
    if (task == "allocations" && count == 3) allocations(words[2]);
    return 0;
}
