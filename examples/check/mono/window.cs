// A window through ONNX Runtime's C API and nothing else: what a program does that can't have the managed package.
// window.exe MODEL INPUT OUTPUT SIZE...: raw float32 files and the sizes of the input; prints the largest error.
using System;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Runtime.InteropServices;
using System.Text;

static class Window
{
    [DllImport("libonnxruntime.so")]
    static extern IntPtr OrtGetApiBase();

    // OrtApi is a table of functions that only grows: a function keeps its place in onnxruntime_c_api.h.
    delegate IntPtr GetApi(uint version);
    delegate IntPtr GetErrorMessage(IntPtr status);
    delegate IntPtr CreateEnv(int level, byte[] name, out IntPtr env);
    delegate IntPtr CreateSession(IntPtr env, byte[] path, IntPtr options, out IntPtr session);
    delegate IntPtr Run(IntPtr session, IntPtr options, IntPtr[] inputNames, IntPtr[] inputs, UIntPtr inputCount,
                        IntPtr[] outputNames, UIntPtr outputCount, IntPtr[] outputs);
    delegate IntPtr Create(out IntPtr created);
    delegate IntPtr CreateTensor(IntPtr memory, float[] data, UIntPtr bytes, long[] shape, UIntPtr rank, int type,
                                 out IntPtr tensor);
    delegate IntPtr GetData(IntPtr tensor, out IntPtr data);
    delegate IntPtr CreateMemoryInfo(int allocator, int type, out IntPtr memory);

    static IntPtr api;

    static T Function<T>(int place)
    {
        return Marshal.GetDelegateForFunctionPointer<T>(Marshal.ReadIntPtr(api, place * IntPtr.Size));
    }

    static void Check(IntPtr status)
    {
        if (status != IntPtr.Zero)
            throw new Exception(Marshal.PtrToStringAnsi(Function<GetErrorMessage>(2)(status)));
    }

    static float[] Read(string path)
    {
        byte[] bytes = File.ReadAllBytes(path);
        var numbers = new float[bytes.Length / 4];
        Buffer.BlockCopy(bytes, 0, numbers, 0, bytes.Length);
        return numbers;
    }

    static void Main(string[] arguments)
    {
        float[] input = Read(arguments[1]), expected = Read(arguments[2]);
        long[] shape = arguments.Skip(3).Select(long.Parse).ToArray();
        api = Marshal.GetDelegateForFunctionPointer<GetApi>(Marshal.ReadIntPtr(OrtGetApiBase()))(14);
        IntPtr env, options, session, memory, tensor, data;
        Check(Function<CreateEnv>(3)(3, Encoding.UTF8.GetBytes("window\0"), out env));
        Check(Function<Create>(10)(out options));
        Check(Function<CreateSession>(7)(env, Encoding.UTF8.GetBytes(arguments[0] + "\0"), options, out session));
        Check(Function<CreateMemoryInfo>(69)(1, 0, out memory));
        GCHandle pin = GCHandle.Alloc(input, GCHandleType.Pinned); // the tensor is this array
        Check(Function<CreateTensor>(49)(memory, input, (UIntPtr)(4 * input.Length), shape, (UIntPtr)shape.Length, 1,
                                         out tensor));
        var outputs = new IntPtr[1];
        Check(Function<Run>(9)(session, IntPtr.Zero, new[] { Marshal.StringToHGlobalAnsi("state_sequence") },
                               new[] { tensor }, (UIntPtr)1, new[] { Marshal.StringToHGlobalAnsi("output") },
                               (UIntPtr)1, outputs));
        Check(Function<GetData>(51)(outputs[0], out data));
        var found = new float[expected.Length];
        Marshal.Copy(data, found, 0, found.Length);
        pin.Free();
        float largest = expected.Select(Math.Abs).Aggregate(1f, Math.Max);
        float error = found.Zip(expected, (x, y) => Math.Abs(x - y)).Aggregate(0f, Math.Max); // a NaN stays one
        Console.WriteLine((error / largest).ToString(CultureInfo.InvariantCulture));
    }
}
