"""Many streams over one batch: users come, ask, and go, and whatever is ready is computed in one call.

Needs a bundle with room for them: famexport export CKPT -o BUNDLE --graphs all --batch dynamic
python samples/many_streams.py BUNDLE [USERS] [TOKENS]
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import famexport as fx
from famexport.errors import exit_on_error

CAPACITY = 4


def main(bundle: str, users: int = 12, tokens: int = 16) -> None:
    with fx.load(bundle) as session, session.pool(CAPACITY) as pool:
        vocabulary = session.contract.vocab_size

        def user(number: int) -> list[int]:
            prompt = np.random.default_rng(number).integers(0, vocabulary, 5 + 3 * number)
            with pool.open() as stream:
                return list(stream.generate(prompt, tokens))

        started = time.perf_counter()
        with ThreadPoolExecutor(CAPACITY) as threads:  # no more users at once than there are rows
            answers = list(threads.map(user, range(users)))
        seconds = time.perf_counter() - started
        for number, answer in enumerate(answers):
            print(f"user {number}: {answer[:8]} ...")
        made = sum(map(len, answers))
        print(f"{made} tokens in {seconds:.1f} s and {pool.calls} calls: {made / seconds:.0f} tokens/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("users", type=int, nargs="?", default=12)
    parser.add_argument("tokens", type=int, nargs="?", default=16)
    with exit_on_error():
        main(**vars(parser.parse_args()))
