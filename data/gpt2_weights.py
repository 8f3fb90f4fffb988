"""GPT-2's weights as files: fetch them, read them into our GPT, and write ours the same way.

A folder holds model.safetensors and config.json, as on the Hugging Face hub. Our GPT has GPT-2's names, so that every
tensor has its place; GPT-2 stores the matrices of its blocks transposed. A linear GPT is written with the same names,
its feature maps besides, and a config.json that says which attention it has; `load_gpt2` reads both.
"""

import json
import os
import re
import shutil
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from data.prepare import USER_AGENT, download, sha256
from hedgehog import GPT, GPTConfig
from train_gpt import HERE, free_name, save_json, write_atomically

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
except ImportError:
    raise ValueError("GPT-2's files need safetensors: pip install safetensors") from None

SIZES = ("vocab_size", "n_positions", "block_size", "n_layer", "n_head", "n_embd")  # in config.json
HUB = "https://huggingface.co/openai-community/{}/resolve/main/{}"


def download_teacher(name):
    """The folder with GPT-2's two files, fetched from the Hugging Face hub at the first use."""
    folder = HERE / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for file in ("config.json", "model.safetensors"):
            path, url = folder / file, HUB.format(name, file)
            if not path.exists():
                remedy = f"get {url} elsewhere and put it at {path}"
                download([url], path, partial(is_whole, expected=hub_sha256(url)), remedy)
            if not sha256_record(path).exists():
                save_sha256(path)
    finally:
        with suppress(OSError):
            folder.rmdir()  # which it does if nothing came
    return folder


def is_whole(part, expected):
    """By its sha256 where that is known, otherwise by its form."""
    if expected:
        return file_sha256(part) == expected
    try:
        if part.name.startswith("config.json"):
            json.loads(part.read_text())
        else:
            with safe_open(part, "pt"):
                pass
        return True
    except (ValueError, SafetensorError):
        return False


def hub_sha256(url):
    """The sha256 of a large file, which the hub sends with its redirection; None for a small file, or no network."""
    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_):
            return None
    try:
        request = urllib.request.Request(url, headers=USER_AGENT, method="HEAD")
        headers = urllib.request.build_opener(Stay).open(request, timeout=30).headers
    except urllib.error.HTTPError as e:  # the redirection, if nothing else
        headers = e.headers
    except OSError:
        return None
    tag = (headers["X-Linked-Etag"] or headers["ETag"] or "").strip('"')
    return tag if re.fullmatch("[0-9a-f]{64}", tag) else None


def file_sha256(path):
    with open(path, "rb") as f:
        return sha256(f)


def sha256_record(path):
    return path.with_name(path.name + ".sha256")


def save_sha256(path):
    """Beside the file, as `sha256sum --check` reads it: what is changed later is noticed."""
    text = f"{file_sha256(path)}  {path.name}\n"
    write_atomically(sha256_record(path), lambda f: f.write(text.encode()))


def load_gpt2(folder):
    """A GPT, softmax or linear, from a folder with model.safetensors and config.json: GPT-2's own, or of --export.
    Both have a .sha256 beside each file, which is checked; without it any weights of the right shapes are taken."""
    folder = Path(folder)
    config_path, path = folder / "config.json", folder / "model.safetensors"
    for needed in (config_path, path):
        if not needed.exists():
            raise ValueError(f"{folder} has no {needed.name}: it must hold config.json and model.safetensors")
        record = sha256_record(needed)
        if record.exists() and record.read_text().split()[:1] != [file_sha256(needed)]:
            raise ValueError(f"{needed} is not the file that {record.name} beside it tells of: delete both and get it "
                             "again")
    model = GPT(gpt2_config(config_path)).eval()
    expected = dict([*model.named_parameters(), *model.named_buffers()])
    try:
        with safe_open(path, "pt") as f, torch.no_grad():
            # GPT2Model has no prefix and GPT2LMHeadModel has one; older files hold the causal mask as a buffer.
            stored = {n if n.startswith(("transformer.", "lm_head.")) else "transformer." + n: n for n in f.keys()
                      if not re.search(r"\.attn\.(masked_)?bias$", n)}
            shapes = {n: tuple(f.get_slice(s).get_shape()) for n, s in stored.items()}
            dtypes = {n: f.get_slice(s).get_dtype() for n, s in stored.items()}
            odd = [f"{n} ({dtype})" for n, dtype in dtypes.items() if "F" not in dtype]   # as in F32, F16 and BF16
            if odd:
                raise ValueError(f"{path} holds weights that are not floating-point: {some(odd)}: get the file again")
            head = stored.pop("lm_head.weight", None) if model.config.tie_head else None
            wrong = [n for n, p in expected.items() if n in stored and conv1d(n, p).shape != shapes[n]]
            if expected.keys() != stored.keys() or wrong:
                raise ValueError(f"{path} does not fit its config.json: "
                                 f"missing: {some(expected.keys() - stored.keys())}; left over: "
                                 f"{some(stored.keys() - expected.keys())}; of another shape: {some(wrong)}")
            for name, p in expected.items():
                conv1d(name, p).copy_(f.get_tensor(stored[name]))
                if not p.isfinite().all():
                    raise ValueError(f"{path}: {name} holds values that are not finite: get the file again")
            if head and not torch.equal(f.get_tensor(head).float(), model.lm_head.weight):
                raise ValueError(f"{path} has an lm_head of its own, config.json says that it is tied: add "
                                 '"tie_word_embeddings": false to it, and delete config.json.sha256 if it is there')
    except SafetensorError as e:
        raise ValueError(f"{path} is truncated or no safetensors file ({e}): get it again") from e
    return model


def conv1d(name, p):
    """The weight as GPT-2 stores it: (in, out), which is a view of our (out, in)."""
    return p.mT if re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name) else p


def some(names):
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"


def gpt2_config(path):
    try:
        given = json.loads(path.read_text())
        for name, size in (given | given.get("hedgehog", {})).items():
            if name in SIZES and (type(size) is not int or size < 1):
                raise ValueError(f"{name} is {size!r}, it must be a whole number of at least 1: get the file again")
        if "hedgehog" in given:
            return GPTConfig(**given["hedgehog"])
        # What our GPT has fixed: another value would load, and then compute something else.
        fixed = dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
                     n_inner=4 * given["n_embd"], scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
                     add_cross_attention=False)
        odd = [f"{k}={given[k]}" for k, v in fixed.items() if given.get(k) not in (None, v)]
        if odd:
            raise ValueError(f"not of a plain GPT-2 ({', '.join(odd)}): it cannot be converted here")
        return GPTConfig(block_size=given["n_positions"], tie_head=given.get("tie_word_embeddings", True),
                         attention="softmax", **{k: given[k] for k in ("vocab_size", "n_layer", "n_head", "n_embd")})
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged, or not GPT-2's ({type(e).__name__}: {e}): get it again") from e
    except ValueError as e:  # of the lines above, or of GPTConfig
        raise ValueError(f"{path}: {e}") from e


def export(model, folder):
    """model.safetensors and config.json, in GPT-2's layout: load_gpt2 reads them, transformers too if it is softmax."""
    folder, c = Path(folder), model.config
    try:
        part = free_name(folder, ".tmp")  # nobody else's, so that it may be removed
        part.mkdir(parents=True)
    except OSError as e:
        raise ValueError(f"could not write {folder} ({e}): choose another --export") from e
    try:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        save_file({n: conv1d(n, p.detach()).cpu().contiguous() for n, p in tensors}, part / "model.safetensors",
                  metadata={"format": "pt"})
        plain = c.attention == "softmax" and c.bias and not c.short_conv and not c.window
        save_json(part / "config.json", dict(
            model_type="gpt2" if plain else "hedgehog_gpt2", architectures=["GPT2LMHeadModel" if plain else "GPT"],
            vocab_size=c.vocab_size, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
            activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=c.tie_head,
            hedgehog=asdict(c)))
        with suppress(OSError):  # a disk without modes
            shutil.copymode(part / "config.json", part / "model.safetensors")  # safetensors': for its owner alone
        for name in ("model.safetensors", "config.json"):
            save_sha256(part / name)
        os.replace(part, folder)
    except (SafetensorError, OSError) as e:
        raise ValueError(f"could not write {folder} ({e}): free some space or choose another --export") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
