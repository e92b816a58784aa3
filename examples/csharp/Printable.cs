using System.Globalization;
using System.Text;

namespace Edifice
{
    /// <summary>Text for a terminal.</summary>
    internal static class Printable
    {
        /// <summary>
        /// One line of text that may come from a file of anybody's: nothing in it moves the cursor, hides or reorders
        /// text, and letters of any script stay as they are.
        /// </summary>
        public static string Line(string text)
        {
            var result = new StringBuilder(text.Length);
            for (int i = 0; i < text.Length; i++)
            {
                bool pair = i + 1 < text.Length && char.IsSurrogatePair(text, i);
                UnicodeCategory kind = CharUnicodeInfo.GetUnicodeCategory(text, i);
                if (text[i] == '\n' || text[i] == '\r')
                {
                    result.Append(' ');
                }
                else if (kind == UnicodeCategory.Control || kind == UnicodeCategory.Format
                    || kind == UnicodeCategory.Surrogate || kind == UnicodeCategory.PrivateUse
                    || kind == UnicodeCategory.LineSeparator || kind == UnicodeCategory.ParagraphSeparator)
                {
                    int code = pair ? char.ConvertToUtf32(text, i) : text[i];
                    result.Append("\\u{").Append(code.ToString("x")).Append('}');
                }
                else
                {
                    result.Append(text, i, pair ? 2 : 1);
                }
                i += pair ? 1 : 0;
            }
            return result.ToString();
        }
    }
}
