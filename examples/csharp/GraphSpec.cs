using Microsoft.ML.OnnxRuntime.Tensors;

namespace Edifice
{
    /// <summary>A tensor that a graph takes or gives. A size of -1 is free: the batch, or the sequence.</summary>
    public sealed class TensorSpec
    {
        public TensorSpec(string name, TensorElementType type, int[] shape)
        {
            (Name, Type, Shape) = (name, type, shape);
        }

        public string Name { get; }
        public TensorElementType Type { get; }
        public int[] Shape { get; }
    }

    /// <summary>What a stream carries from frame to frame: the graphs read past.* and give present.*.</summary>
    public sealed class StateSpec
    {
        public StateSpec(TensorSpec tensor, double initial, string? initialFile)
        {
            (Tensor, Initial, InitialFile) = (tensor, initial, initialFile);
        }

        public TensorSpec Tensor { get; }
        public string Past => "past." + Tensor.Name;
        public string Present => "present." + Tensor.Name;

        /// <summary>The number that fills it before the first frame, unless there is an InitialFile.</summary>
        public double Initial { get; }

        /// <summary>The file that holds what it is before the first frame, for one entry of the batch.</summary>
        public string? InitialFile { get; }
    }

    /// <summary>One graph of a bundle.</summary>
    public sealed class GraphSpec
    {
        public GraphSpec(string model, TensorSpec[] inputs, TensorSpec[] outputs, string[] testData, int? maxSequence)
        {
            (Model, Inputs, Outputs, TestData, MaxSequence) = (model, inputs, outputs, testData, maxSequence);
        }

        public string Model { get; }
        public TensorSpec[] Inputs { get; }
        public TensorSpec[] Outputs { get; }

        /// <summary>Folders with input_0.pb, ..., output_0.pb, ...</summary>
        public string[] TestData { get; }

        /// <summary>A folder with frames from the initial state on and the output at each; of a stream only.</summary>
        public string? TestSequence { get; internal set; }

        /// <summary>The most frames that it can compute at once; null where there is no limit.</summary>
        public int? MaxSequence { get; }
    }
}
