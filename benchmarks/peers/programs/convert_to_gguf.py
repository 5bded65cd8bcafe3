"""llama.cpp's own converter, told which pre-tokenizer to write: SOURCE MODEL_DIRECTORY RESULT.

It knows tokenizers by a hash of what they make of a text, and ours is made up.
"""

import sys


def main(source: str, model: str, result: str) -> None:
    sys.path.insert(0, source)
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", result, "--outtype", "bf16"]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
