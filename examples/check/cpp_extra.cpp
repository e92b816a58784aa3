// Checks of edifice.hpp that are not for a reader: SHA-256, damaged input, allocations. Built in place of main.cpp.
#define ORT_API_MANUAL_INIT  // so that calls of ONNX Runtime can be seen

#include <cstdio>
#include <cstdlib>
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
    const auto results =
        session.Run(Ort::RunOptions{nullptr}, inputs.data(), values.data(), values.size(), outputs.data(), outputs.size());
    int quarters = 0;
    for (std::size_t i = 0; i < outputs.size(); ++i) {
        if (names[inputs.size() + i].find(".ssm") == std::string::npos) continue;
        quarters += *results[i].GetTensorData<float>() == 0.25f;
    }
    std::printf("%d %d\n", Kernel::calls, quarters);
    return 0;
}

// Frames that no model takes leave the stream as it was, and escape codes reach no terminal.
int magnitudes(const std::filesystem::path& folder) {
    edifice::Model model{edifice::Bundle{folder}};
    edifice::Stream stream(model), plain(model);
    const std::size_t width = model.bundle().graph("stream").inputs[0].width();
    const auto frame = [&](float value) { return std::vector<float>(width, value); };
    stream.step(frame(0.5f)), plain.step(frame(0.5f));
    int refused = 0;
    for (const float value : {3.4e38f, -3.4e38f, 1e30f, 1e19f, -1e18f, 1.001e12f, INFINITY, NAN}) {
        const auto refuses = [&](const std::function<void(std::vector<float>)>& call, const std::string& place) {
            std::vector<float> numbers(3 * width, 1.0f);
            numbers[2 * width + 1] = value;
            try {
                call(numbers);
            } catch (const edifice::RequestError& error) {
                const std::string limit = std::isfinite(value) ? "numbers up to 1e12" : "finite numbers only";
                const std::string said = error.what();
                refused += said.find(limit) != said.npos && said.find(place) != said.npos ? 1 : 0;
            }
        };
        refuses([&](const std::vector<float>& numbers) { stream.step(numbers.data() + 2 * width, width); }, "at 1;");
        refuses([&](const std::vector<float>& numbers) { stream.prefill(numbers, 3); }, "in frame 2;");
        refuses([&](const std::vector<float>& numbers) { model.run(numbers, 1, 3); }, "in frame 2;");
    }
    const bool same = stream.rewindable() == 1 && stream.step(frame(0.25f)) == plain.step(frame(0.25f));
    stream.step(frame(edifice::kMaxMagnitude));
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
    const std::vector<float> frame(model.bundle().graph("stream").inputs[0].width(), 0.5f);
    const std::vector<std::function<void()>> calls{
        [&] { model.run(frame, 1, 1); }, [&] { stream.step(frame); }, [&] { stream.prefill(frame, 1); }};
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

// Calls of operator new in steps, snapshots, rewinds and restores: outside of ONNX Runtime's run, and within.
void allocations(const std::filesystem::path& folder) {
    edifice::Model model{edifice::Bundle{folder}};
    edifice::Stream stream(model);
    const std::vector<float> frame(model.bundle().graph("stream").inputs[0].width(), 0.5f);
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
    if (task == "overflow" && count == 3) return overflow(words[2]);
    if (task == "allocations" && count == 3) allocations(words[2]);
    return 0;
}
