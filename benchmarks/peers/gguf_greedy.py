"""What llama.cpp goes on with after prompts, always the most likely token: one JSON object.

    .peers/llamacpp/bin/python benchmarks/peers/gguf_greedy.py FILE.gguf --count 32 --prompts "Once upon a time" "The sea was"

Stand-alone: it runs in the environment of ``llamacpp.sh`` and imports nothing of bitpress. `texts` holds for every prompt its tokens as
llama.cpp splits it, and the tokens after it.
"""

import argparse
import ctypes
import json
import os
from pathlib import Path

import llama_cpp
from gguf_models import keep_log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    llama_cpp.llama_log_set(keep_log, ctypes.c_void_p(0))
    model = llama_cpp.Llama(str(options.file), n_ctx=512, n_threads=options.threads, verbose=False, logits_all=True)
    texts = []
    for prompt in options.prompts:
        tokens = model.tokenize(prompt.encode(), add_bos=False)
        model.reset()
        model.eval(tokens)
        made: list[int] = []
        while len(made) < options.count:
            made.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(made[-1:])
        texts.append({"prompt": tokens, "tokens": made})
    print(json.dumps({"texts": texts, "version": llama_cpp.__version__}))


if __name__ == "__main__":
    main()
