using System;
using System.Diagnostics;
using System.Linq;
using System.Runtime.InteropServices;
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

namespace Edifice
{
    /// <summary>What the self-check does with numbers.</summary>
    public static class Numbers
    {
        /// <summary>The error of a tensor; infinite if it has another type or shape, or integers that differ.</summary>
        public static double Error(OrtValue found, TensorFile expected)
        {
            OrtTensorTypeAndShapeInfo info = found.GetTensorTypeAndShape();
            if (info.ElementDataType != expected.Type || !info.Shape.SequenceEqual(expected.Shape))
            {
                return double.PositiveInfinity;
            }
            return expected.Type == TensorElementType.Float
                ? Error(found.GetTensorDataAsSpan<float>(), MemoryMarshal.Cast<byte, float>(expected.Data))
                : found.GetTensorMutableRawData().SequenceEqual(expected.Data) ? 0 : double.PositiveInfinity;
        }

        /// <summary>max |found - expected| / max(1, max |expected|); infinite where only one is finite.</summary>
        public static double Error(ReadOnlySpan<float> found, ReadOnlySpan<float> expected)
        {
            (double error, double largest) = (0, 1);
            for (int i = 0; i < expected.Length; i++)
            {
                if (!float.IsFinite(found[i]) || !float.IsFinite(expected[i]))
                {
                    if (!found[i].Equals(expected[i]))
                    {
                        return double.PositiveInfinity;
                    }
                    continue;
                }
                error = Math.Max(error, Math.Abs((double)found[i] - expected[i]));
                largest = Math.Max(largest, Math.Abs(expected[i]));
            }
            return error / largest;
        }

        /// <summary>Of numbers [batch, length, width], those at one place of the length.</summary>
        public static float[] Gather(float[] numbers, int batch, int length, int place)
        {
            int width = numbers.Length / (batch * length);
            var one = new float[batch * width];
            for (int entry = 0; entry < batch; entry++)
            {
                Array.Copy(numbers, (entry * length + place) * width, one, entry * width, width);
            }
            return one;
        }

        /// <summary>Puts numbers [batch, width] at one place of the length of [batch, length, width].</summary>
        public static void Scatter(ReadOnlySpan<float> one, float[] numbers, int batch, int length, int place)
        {
            int width = one.Length / batch;
            for (int entry = 0; entry < batch; entry++)
            {
                one.Slice(entry * width, width).CopyTo(numbers.AsSpan((entry * length + place) * width));
            }
        }

        /// <summary>The median, the 99th percentile and the largest of some times, in milliseconds.</summary>
        public static (double P50, double P99, double Max) Percentiles(long[] ticks)
        {
            Array.Sort(ticks);
            double At(double part) => ticks[(int)Math.Ceiling(part * ticks.Length) - 1] * 1000.0 / Stopwatch.Frequency;
            return (At(0.5), At(0.99), At(1));
        }

        /// <summary>Whether two outputs are the same bit by bit.</summary>
        public static bool Same(ReadOnlySpan<float> one, ReadOnlySpan<float> other)
        {
            return MemoryMarshal.AsBytes(one).SequenceEqual(MemoryMarshal.AsBytes(other));
        }
    }
}
