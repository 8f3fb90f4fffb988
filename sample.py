"""Let a trained model write: python sample.py runs/tiny-hedgehog --prompt "The "

Text is printed as it is made. With linear attention every token costs the same, however long the text has become, but
for reading half a block again each time the block is full.
"""

import argparse
import codecs
import sys
import time
from pathlib import Path

import torch

from data.prepare import load_tokenizer
from train_gpt import best_of, cli, encode_prompt, load_model, pick_device


def sample(checkpoint, prompt="\n", tokens=500, temperature=0.8, top_k=50, seed=0, device="auto",
           write=sys.stdout.write):
    """Stream `tokens` tokens after the prompt to `write`. Returns the whole text, prompt included."""
    path = best_of(Path(checkpoint))
    device, _, why = pick_device(device, "float32")
    model, saved = load_model(path, device)
    tokenizer = load_tokenizer(saved["meta"]["tokenizer"])
    ids = encode_prompt(tokenizer, prompt).to(device)
    torch.manual_seed(seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span several tokens
    text = prompt
    write(prompt)
    start = time.perf_counter()
    for token in model.stream(ids, tokens, temperature, top_k or None):
        piece = decoder.decode(tokenizer.decode_bytes(token[0].tolist()))
        text += piece
        write(piece)
        sys.stdout.flush()
    seconds = time.perf_counter() - start
    each = 1000 * seconds / max(1, tokens)
    print(f"\n--- {tokens} {tokenizer.unit}s in {seconds:.1f} s ({each:.1f} ms each) on {why}; "
          f"{saved['config']['attention']}, {path}", file=sys.stderr)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", help="a run folder (its best.pt, or finetuned/best.pt) or a .pt file")
    parser.add_argument("--prompt", default="\n", help="beginning of the text")
    parser.add_argument("--tokens", type=int, default=500, help="how many to write, in the model's unit")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--top-k", type=int, default=50, help="draw from the k likeliest only; 0: from all")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="where to run")
    cli(lambda: sample(**vars(parser.parse_args())), out_of_memory="say --device cpu")
