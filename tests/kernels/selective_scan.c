/* A kernel for two bodies of edifice::SelectiveScan: all read-outs, with and without the state that is left. */
#include "onnxruntime_c_api.h"

#include <math.h>
#include <string.h>

float marker = 0;  /* added to every output, to be seen in them */
long calls[2] = {0, 0};  /* with one output, with two */

static const OrtApi* runtime;

typedef struct {
    OrtCustomOp op;  /* first, so that a pointer to it is one to all */
    const char* name;
    size_t outputs;
} Body;

/* An input's numbers, and its shape. */
static const float* input(OrtKernelContext* context, size_t index, int64_t* dims) {
    const OrtValue* value;
    OrtTensorTypeAndShapeInfo* info;
    void* data;
    size_t rank;
    runtime->KernelContext_GetInput(context, index, &value);
    runtime->GetTensorTypeAndShape(value, &info);
    runtime->GetDimensionsCount(info, &rank);
    runtime->GetDimensions(info, dims, rank);
    runtime->ReleaseTensorTypeAndShapeInfo(info);
    runtime->GetTensorMutableData((OrtValue*)value, &data);
    return data;
}

static float* output(OrtKernelContext* context, size_t index, int64_t first, int64_t second, int64_t third) {
    const int64_t dims[3] = {first, second, third};
    OrtValue* value;
    void* data;
    runtime->KernelContext_GetOutput(context, index, dims, 3, &value);
    runtime->GetTensorMutableData(value, &data);
    return data;
}

static void compute(void* kernel, OrtKernelContext* context) {
    const Body* body = kernel;
    int64_t of_x[3], of_delta[3], of_a[2], of_b[3], of_c[3], of_initial[3];
    const float* x = input(context, 0, of_x);
    const float* delta = input(context, 1, of_delta);
    const float* a = input(context, 2, of_a);
    const float* b = input(context, 3, of_b);
    const float* c = input(context, 4, of_c);
    const float* initial = input(context, 5, of_initial);
    const int64_t batch = of_x[0], length = of_x[1], channels = of_x[2], states = of_c[2];
    float* y = output(context, 0, batch, length, channels);
    float* final = body->outputs == 2 ? output(context, 1, batch, states, channels) : NULL;
    memset(y, 0, sizeof(float) * batch * length * channels);
    for (int64_t entry = 0; entry < batch; ++entry)
        for (int64_t n = 0; n < states; ++n)
            for (int64_t channel = 0; channel < channels; ++channel) {
                const int64_t from = of_initial[0] == 1 ? 0 : entry;
                const float rate = a[(of_a[0] == 1 ? 0 : channel) * states + n];
                float h = initial[(from * states + n) * channels + channel];
                for (int64_t t = entry * length; t < (entry + 1) * length; ++t) {
                    const int64_t at = t * channels + channel;
                    h = expf(delta[at] * rate) * h + b[t * states + n] * x[at];
                    y[at] += c[t * states + n] * h;
                }
                if (final) final[(entry * states + n) * channels + channel] = h;
            }
    for (int64_t i = 0; i < batch * length * channels; ++i) y[i] += marker;
    ++calls[body->outputs - 1];
}

static void* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info) {
    (void)api, (void)info;
    return (void*)op;
}
static void destroy(void* kernel) { (void)kernel; }
static const char* name(const OrtCustomOp* op) { return ((const Body*)op)->name; }
static const char* provider(const OrtCustomOp* op) { return (void)op, NULL; }  /* the CPU's */
static size_t inputs(const OrtCustomOp* op) { return (void)op, 6; }
static size_t outputs(const OrtCustomOp* op) { return ((const Body*)op)->outputs; }
static ONNXTensorElementDataType type(const OrtCustomOp* op, size_t index) {
    return (void)op, (void)index, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}
static OrtCustomOpInputOutputCharacteristic required(const OrtCustomOp* op, size_t index) {
    return (void)op, (void)index, INPUT_OUTPUT_REQUIRED;
}
static OrtMemType memory(const OrtCustomOp* op, size_t index) { return (void)op, (void)index, OrtMemTypeDefault; }
static int none(const OrtCustomOp* op) { return (void)op, 0; }

static Body bodies[2];

/* What ONNX Runtime calls when a session's options are given this library. */
OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    static const char* const names[2] = {"SelectiveScan_plain_6to1", "SelectiveScan_plain_6to2"};
    OrtCustomOpDomain* domain;
    runtime = base->GetApi(14);
    OrtStatus* status = runtime->CreateCustomOpDomain("edifice", &domain);
    for (int i = 0; i < 2 && status == NULL; ++i) {
        bodies[i] = (Body){.name = names[i], .outputs = i + 1};
        bodies[i].op = (OrtCustomOp){.version = 14,
                                     .CreateKernel = create,
                                     .GetName = name,
                                     .GetExecutionProviderType = provider,
                                     .GetInputType = type,
                                     .GetInputTypeCount = inputs,
                                     .GetOutputType = type,
                                     .GetOutputTypeCount = outputs,
                                     .KernelCompute = compute,
                                     .KernelDestroy = destroy,
                                     .GetInputCharacteristic = required,
                                     .GetOutputCharacteristic = required,
                                     .GetInputMemoryType = memory,
                                     .GetVariadicInputMinArity = none,
                                     .GetVariadicInputHomogeneity = none,
                                     .GetVariadicOutputMinArity = none,
                                     .GetVariadicOutputHomogeneity = none};
        status = runtime->CustomOpDomain_Add(domain, &bodies[i].op);
    }
    return status != NULL ? status : runtime->AddCustomOpDomain(options, domain);
}
