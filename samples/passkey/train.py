"""Train a small FAM model, or the same without FAM, to keep a pass key: truncated backpropagation through blocks.

    python -m samples.passkey.train -o CHECKPOINT --minutes 9
    python -m samples.passkey.train -o ADAPTER --start BASE --lora 24 --minutes 9

``--start`` goes on from a checkpoint; block size, memory segments and the like may differ from its own, as no weight
depends on them. With ``--lora`` its weights stay, and an adapter is written. How streams are trained: ``streams.py``.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from famexport.checkpoint import (
    FAM_WEIGHT,
    Checkpoint,
    open_checkpoint,
    random_weight,
    sampled_fam_embeddings,
    write_checkpoint,
)
from famexport.config import FamConfig
from famexport.errors import exit_on_error
from famexport.model import FamModel
from samples.passkey import lora
from samples.passkey.streams import Options, Streams, recall
from samples.passkey.task import FILLERS, FORMS, Task
from samples.passkey.tokenizer import byte_tokenizer

LENGTHS = (1_024, 4_096, 16_384, 65_536, 262_144)
LOOK, FINAL = 10_000, 20_000  # seeds of keys asked for during training and after it; others than those of evaluate.py


def train(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train for the minutes given and write the result; the lines of the learning curve."""
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    rng, device = np.random.default_rng(options.seed), options.device
    start = open_checkpoint(options.start) if options.start else None
    model = initial_model(options, start).to(device)
    adapted = lora.attach(model, options.lora, 2 * options.lora) if options.lora else {}
    if options.adapter:
        lora.load(options.adapter, model, adapted)
    model.to(device)
    task = Task(options.form, encoder(start))
    streams = Streams(
        model,
        task,
        Options(options.batch, options.oldest, options.noise, bool(options.lora), options.seed),
        device,
    )
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01)
    began, step, blocks, exact, looked, curve = time.monotonic(), 0, 1, 0.0, 0.0, []
    while (share := (time.monotonic() - began) / (options.minutes * 60)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1, (step + 1) / options.warm_up) * max(0.02, 1 - share)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            found = streams.losses(int(rng.integers(max(1, blocks // 2), blocks + 1)), rng)
            loss = found["answer"] + options.penalty * found["norm"]
            loss = loss + options.still * found["moved"] + options.growth * found["growth"]
            loss = loss + options.language * found["language"] + 0.2 * found.get("copy", 0.0)
        optimizer.zero_grad(set_to_none=not options.lora)  # a replayed step adds to what is there
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        step += 1
        if step % 10 == 0:
            exact = 0.8 * exact + 0.2 * float(streams.right.float().mean())
            if exact > 0.8 and blocks < options.blocks:
                blocks, exact = blocks + 1, 0.6
        if step % options.log == 0:
            seconds = time.monotonic() - began
            ages = torch.quantile(streams.age, torch.tensor([0.5, 0.9, 1.0], device=device)).tolist()
            line = {"step": step, "seconds": round(seconds), "blocks": blocks, "exact": round(exact, 3)}
            line |= {"ages": [round(age) for age in ages]}
            line |= {name: round(float(value.detach()), 4) for name, value in found.items()}
            if seconds - looked > options.look:
                looked = seconds
                line["recall"] = [recall(model, task, "docs", n, 50, LOOK, device) for n in options.lengths]
            curve.append(line)
            print(json.dumps(line), flush=True)
    report = {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "steps": step,
        "seconds": round(time.monotonic() - began),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "curve": curve,
    }
    write(options, model, adapted, start)
    file = options.output / "training.json"
    file.write_text(json.dumps(report) + "\n")  # the weights are safe, whatever happens to what follows
    report["recall"] = {"tokens": options.lengths}
    for kind in FILLERS:
        report["recall"][kind] = [recall(model, task, kind, n, 50, FINAL, device) for n in options.lengths]
        print(json.dumps(report["recall"]), flush=True)
        file.write_text(json.dumps(report) + "\n")
    return curve


def initial_model(o: argparse.Namespace, start: Checkpoint | None) -> FamModel:
    sizes = {"block_size": o.block_size, "memory_segments": o.memory_segments, "fam_length": o.fam_length}
    if start is None:
        config = FamConfig(
            vocab_size=256,
            hidden_size=o.width,
            intermediate_size=o.width * 11 // 4,
            num_hidden_layers=o.layers,
            num_attention_heads=o.heads,
            num_key_value_heads=o.heads,
            head_dim=o.width // o.heads,
            tie_word_embeddings=True,
            **sizes,
        )
    else:
        config = replace(start.config, **sizes)
    model = FamModel(config)
    for name, p in model.named_parameters():
        if start is None:
            p.data = random_weight(name, tuple(p.shape), o.seed, config.num_hidden_layers)
        elif name == FAM_WEIGHT and start.config.fam_length != config.fam_length:
            p.data = sampled_fam_embeddings(model.model.embed_tokens.weight.data, config.fam_length, o.seed)
        else:
            p.data = start.tensor(name).float()
    return model


def encoder(start: Checkpoint | None) -> Any:
    if start is None or start.config.vocab_size == 256:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(start.tokenizer))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def write(o: argparse.Namespace, model: FamModel, adapted: dict[str, lora.LowRank], start: Checkpoint | None) -> None:
    """The checkpoint, or the adapter."""
    if adapted:
        lora.save(o.output, model, adapted, o.lora, 2 * o.lora)
        return
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
    extra = start.tokenizer_files() if start else {"tokenizer.json": byte_tokenizer()}
    dtypes = dict.fromkeys(weights, o.dtype)
    trained = bool(model.config.fam_length)
    write_checkpoint(o.output, model.config, dtypes, weights.__getitem__, fam_trained=trained, extra=extra)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--start", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--lora", type=int, default=0, help="rank of the adapter to train on it; 0 trains all weights")
    parser.add_argument("--adapter", type=Path, help="with --lora: an adapter of that rank to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--form", choices=FORMS, default="text")
    parser.add_argument("--block-size", type=int, default=1024)
    parser.add_argument("--memory-segments", type=int, default=0)
    parser.add_argument("--fam-length", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=48, help="streams side by side")
    parser.add_argument("--blocks", type=int, default=6, help="most blocks that gradients go through")
    parser.add_argument("--oldest", type=int, default=1000, help="most blocks that a key is kept in training")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warm-up", type=int, default=200, help="steps until the learning rate is reached")
    parser.add_argument("--language", type=float, default=0.1, help="weight of the loss on the filler")
    parser.add_argument("--noise", type=float, default=0.02, help="on the state at the start of a step, relative")
    parser.add_argument("--penalty", type=float, default=0.05, help="on FAM's norm")
    parser.add_argument("--growth", type=float, default=0.5, help="penalty on FAM's growth where no key is said")
    parser.add_argument("--still", type=float, default=0.0, help="penalty on FAM's change, likewise")
    parser.add_argument("--dtype", default="float16", help="of the checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log", type=int, default=100, help="steps between lines of the learning curve")
    parser.add_argument("--look", type=float, default=100.0, help="seconds between measurements of recall")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    options = parser.parse_args(words)
    if options.lora and not (options.start and options.fam_length):
        parser.error("--lora adapts a checkpoint (--start) that has FAM (--fam-length 1 or more)")
    if options.adapter and not options.lora:
        parser.error("--adapter goes on from an adapter: it needs --start BASE --lora RANK, as that was trained")
    return options


if __name__ == "__main__":
    with exit_on_error():
        train(arguments())
