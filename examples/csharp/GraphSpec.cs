using System;
using System.Collections.Generic;
using System.Linq;
using Microsoft.ML.OnnxRuntime.Tensors;

namespace Edifice
{
    /// <summary>A size of a tensor: a number, or a free one.</summary>
    public readonly struct Size
    {
        public Size(int number) => (Number, Symbol) = (number, null);

        public Size(string symbol) => (Number, Symbol) = (0, symbol);

        /// <summary>The number; 0 of a free size.</summary>
        public int Number { get; }

        /// <summary>
        /// What a free size is called, such as batch: the same number wherever it stands. Of outputs it may be an
        /// expression, such as sequence + 4. Null of a number.
        /// </summary>
        public string? Symbol { get; }

        /// <summary>Whether it is the frames that a stream has seen: states of that size grow with it.</summary>
        internal bool IsPast => Symbol == "past";

        public override string ToString() => Symbol ?? Number.ToString();
    }

    /// <summary>A tensor that a graph takes or gives.</summary>
    public class TensorSpec
    {
        public TensorSpec(string name, TensorElementType type, Size[] shape)
        {
            (Name, Type, Shape) = (name, type, shape);
        }

        public string Name { get; }
        public TensorElementType Type { get; }
        public Size[] Shape { get; }

        /// <summary>The product of the sizes that are numbers.</summary>
        public int Width
        {
            get
            {
                IEnumerable<Size> numbers = Shape.Where(size => size.Symbol == null);
                return (int)Math.Min(int.MaxValue, numbers.Aggregate(1.0, (width, size) => width * size.Number));
            }
        }

        /// <summary>Such as state_sequence float32 [batch, sequence, 287].</summary>
        public override string ToString() => $"{Name} {ElementTypes.Name(Type)} [{string.Join(", ", Shape)}]";

        /// <summary>The shape for so many entries: of a frame, or of a state after so many frames.</summary>
        internal long[] OfBatch(int batch, long past = 0)
        {
            return Shape.Select(size => size.Symbol == null ? size.Number : size.IsPast ? past : (long)batch).ToArray();
        }
    }

    /// <summary>What an input may hold.</summary>
    public enum Values
    {
        /// <summary>Any numbers up to EdificeModel.MaxMagnitude; drawn from a normal distribution.</summary>
        Normal,

        /// <summary>From 0 and below a limit, and no others.</summary>
        Ids,

        /// <summary>Any; drawn from 0 and below a number.</summary>
        Integers,

        /// <summary>Along the last axis ones after some zeros.</summary>
        Mask,
    }

    /// <summary>A tensor that a graph takes.</summary>
    public sealed class InputSpec : TensorSpec
    {
        public InputSpec(TensorSpec tensor, Values values, long below) : base(tensor.Name, tensor.Type, tensor.Shape)
        {
            (Values, Below) = (values, below);
        }

        public Values Values { get; }

        /// <summary>Of ids and integers.</summary>
        public long Below { get; }
    }

    /// <summary>What a stream carries from frame to frame: the graphs read past.* and give present.*.</summary>
    public sealed class StateSpec
    {
        public StateSpec(TensorSpec tensor, double initial, string? initialFile)
        {
            (Tensor, Initial, InitialFile) = (tensor, initial, initialFile);
            Grows = tensor.Shape.Any(size => size.IsPast);
        }

        public TensorSpec Tensor { get; }

        /// <summary>Whether it is longer after every frame, as keys and values of full attention are.</summary>
        public bool Grows { get; }

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
        internal GraphSpec(string model, InputSpec[] inputs, TensorSpec[] outputs, int states)
        {
            (Model, Inputs, Outputs) = (model, inputs, outputs);
            OwnInputs = inputs.Take(inputs.Length - states).ToArray();
            OwnOutputs = outputs.Take(outputs.Length - states).ToArray();
            InputNames = inputs.Select(input => input.Name).ToArray();
            OutputNames = outputs.Select(output => output.Name).ToArray();
        }

        public string Model { get; }

        /// <summary>The file beside it that it keeps its weights in; null if it has them itself.</summary>
        public string? Weights { get; internal set; }

        /// <summary>All that it takes: its own inputs, and then past.* of every state, in their order.</summary>
        public InputSpec[] Inputs { get; }

        /// <summary>All that it gives: its own outputs, and then present.* of every state.</summary>
        public TensorSpec[] Outputs { get; }

        /// <summary>What a caller gives it.</summary>
        public InputSpec[] OwnInputs { get; }

        /// <summary>What a caller gets of it.</summary>
        public TensorSpec[] OwnOutputs { get; }

        /// <summary>Of free sizes that can't be any number: the least, and the most or null.</summary>
        public Dictionary<string, (int Least, int? Most)> Limits { get; } =
            new Dictionary<string, (int Least, int? Most)>();

        /// <summary>Folders with input_0.pb, ..., output_0.pb, ...</summary>
        public string[] TestData { get; internal set; } = { };

        /// <summary>A folder with frames from the initial state on and the outputs at each; of a stream only.</summary>
        public string? TestSequence { get; internal set; }

        internal string[] InputNames { get; }
        internal string[] OutputNames { get; }

        /// <summary>The one input of a graph that takes and gives one float32 tensor beside states.</summary>
        /// <exception cref="ArgumentException">It takes or gives others.</exception>
        internal InputSpec OnlyFloats()
        {
            bool only = OwnInputs.Length == 1 && OwnInputs[0].Type == TensorElementType.Float
                && OwnOutputs.Length == 1 && OwnOutputs[0].Type == TensorElementType.Float;
            return only
                ? OwnInputs[0]
                : throw new ArgumentException(
                    $"the model takes {string.Join<InputSpec>(", ", OwnInputs)} and gives "
                    + $"{string.Join<TensorSpec>(", ", OwnOutputs)}; give and take EdificeTensors");
        }
    }
}
