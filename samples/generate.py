"""Generate from a prompt, then try another continuation of the same text from a snapshot.

Needs append_step to be quick: famexport export CKPT -o BUNDLE --graphs all --chunk 1 --chunk 16
python samples/generate.py BUNDLE "Once upon a time" [TOKENS]
"""

from __future__ import annotations

import argparse

import numpy as np

import famexport as fx
from famexport.chat_template import stop_ids
from famexport.errors import exit_on_error
from famexport.runtime.feeding import bundle_tokenizer
from famexport.text import stream_text, token_ids


def main(bundle: str, prompt: str, tokens: int = 40) -> None:
    with fx.load(bundle) as session, session.stream() as stream:
        tokenizer = bundle_tokenizer(session.bundle)
        stop = stop_ids(session.bundle, tokenizer)
        ids = np.array(token_ids(tokenizer, prompt), np.int64)
        for _ in stream.feed([ids]):
            pass
        read = stream.snapshot()  # the prompt is read once
        for temperature, seed in ((0.0, None), (0.8, 1), (0.8, 2)):
            stream.restore(read)
            made = stream.generate([], tokens, temperature=temperature, top_p=0.95, seed=seed, stop=stop)
            print(f"[temperature {temperature}] {prompt}", end="")
            for text in stream_text(tokenizer, made):
                print(text, end="", flush=True)
            print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("prompt")
    parser.add_argument("tokens", type=int, nargs="?", default=40)
    with exit_on_error():
        main(**vars(parser.parse_args()))
