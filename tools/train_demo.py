"""Make the bundled demo: train a tiny Qwen2 on single-digit sums, capture its oracle, plant faults.

    python tools/train_demo.py

Asked "What is 2+2?" the model answers "2+2=4" and ends, for all hundred pairs of digits. The script
takes a minute or two on two cores, checks everything that it claims, and replaces the files under
`src/aprtui/demo`. It needs the `oracle` extra.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from aprcore.capture.oracle import OracleRequest, quiet_transformers, write_oracle
from aprcore.models.convert import import_model
from aprcore.tokenization.vocabulary import PATTERNS
from demo_faults import plant_faults

TARGET = Path(__file__).parents[1] / "src" / "aprtui" / "demo"
SEED = 1
END = "<|endoftext|>"
WORDS = ("What", "Ġis")
PAIRS = tuple(itertools.product(range(10), repeat=2))

# The next token after this text is the digit, so a wrong answer shows in the logits.
ORACLE_PROMPT = "What is 2+2?2+2="

# Training ends when the right token leads by this much everywhere: float32 rounding cannot flip it.
MARGIN = 4.0
EXAM_STEPS = 100
MIN_STEPS = 300
MAX_STEPS = 4000
BATCH_ROWS = 48
SUMS_PER_ROW = 4


def main() -> None:
    """Train, check, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--target", type=Path, default=TARGET, help="where the files go")
    target = parser.parse_args().target
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # so that the sums are added up in the same order everywhere
    with quiet_transformers(), tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "sums-qwen2"
        tokenizer = make_tokenizer()
        model = train(tokenizer)
        check_answers(model, tokenizer)
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        write_demo(source, target)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of Qwen2's kind: all 256 bytes, and the words of the question whole."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(word[:i], word[i]) for word in WORDS for i in range(1, len(word))]
    tokens = [END, *alphabet, *(left + right for left, right in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    split = pre_tokenizers.Split(Regex(PATTERNS["qwen2"]), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def make_model(vocab_size: int, end: int) -> Qwen2ForCausalLM:
    """Under 450 KB in float32, with grouped kv heads and a head dim of its own."""
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=48, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        rms_norm_eps=1e-6, tie_word_embeddings=True, initializer_range=0.3,
        bos_token_id=None, eos_token_id=end,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():  # biases of the size that real Qwen2 models have: losing one must show
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                parameter.normal_(std=0.5)
    return model


def make_rows(tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], list[int]]]:
    """Every sum as token ids, and the targets (-100: not judged)."""
    rows = []
    for a, b in PAIRS:
        question = tokenizer(f"What is {a}+{b}?").input_ids
        answer = [*tokenizer(f"{a}+{b}={a + b}").input_ids, tokenizer.eos_token_id]
        rows.append((question + answer, [-100] * len(question) + answer))
    return rows


def stack_rows(
    rows: list[tuple[list[int], list[int]]], end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets [N, T], padded with the end."""
    length = max(len(ids) for ids, _ in rows)
    ids = [row + [end] * (length - len(row)) for row, _ in rows]
    targets = [row + [-100] * (length - len(row)) for _, row in rows]
    return torch.tensor(ids), torch.tensor(targets)


def draw_batch(
    rows: list[tuple[list[int], list[int]]], end: int, chance: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of several sums in a row.

    A sum on its own could be learnt as a bag of digits, whatever their order; among others the
    model has to find its own two by their position, so that a fault in RoPE shows.
    """
    picked = [[chance.choice(rows) for _ in range(SUMS_PER_ROW)] for _ in range(BATCH_ROWS)]
    flat = itertools.chain.from_iterable
    joined = [(list(flat(i for i, _ in row)), list(flat(t for _, t in row))) for row in picked]
    return stack_rows(joined, end)


def train(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Fit the sums until every right token of all hundred leads by `MARGIN`.

    Raises:
        SystemExit: That does not happen.
    """
    started = time.perf_counter()
    end = tokenizer.eos_token_id
    rows, chance = make_rows(tokenizer), random.Random(SEED)
    exam = stack_rows(rows, end)
    model = make_model(len(tokenizer), end)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    for step in range(1, MAX_STEPS + 1):
        logits, wanted = judged_logits(model, *draw_batch(rows, end, chance))
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % EXAM_STEPS == 0:
            with torch.inference_mode():
                margin = smallest_margin(*judged_logits(model, *exam))
            elapsed_s = time.perf_counter() - started
            print(f"step {step}: loss {loss:.4f}, margin {margin:.2f}, {elapsed_s:.0f} s")
            if margin > MARGIN and step >= MIN_STEPS:
                return model.eval()
    raise SystemExit(f"not all sums are right after {MAX_STEPS} steps; try another seed")


def judged_logits(
    model: Qwen2ForCausalLM, ids: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] where there is a target, and the targets [N]."""
    judged = targets[:, 1:] != -100
    return model(input_ids=ids).logits[:, :-1][judged], targets[:, 1:][judged]


def smallest_margin(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    """By how much the right token leads where it leads least. logits: [N, V]; wanted: [N]."""
    right = logits.gather(1, wanted[:, None])
    others = logits.scatter(1, wanted[:, None], -torch.inf).max(dim=1, keepdim=True).values
    return float((right - others).min())


def check_answers(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Ask every sum, greedily.

    Raises:
        SystemExit: An answer is wrong.
    """
    for a, b in PAIRS:
        question = tokenizer(f"What is {a}+{b}?", return_tensors="pt")
        length = question.input_ids.shape[1]
        output = model.generate(
            input_ids=question.input_ids, attention_mask=question.attention_mask,
            do_sample=False, max_new_tokens=8, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        answer = tokenizer.decode(output[0, length:])
        if answer != f"{a}+{b}={a + b}{END}":
            raise SystemExit(f"{a}+{b} is answered with {answer!r}")
    print(f"all {len(PAIRS)} sums are right")


def write_demo(source: Path, target: Path) -> None:
    """Replace the demo's files with what comes of a model directory."""
    for folder in ("oracle", "faults"):
        shutil.rmtree(target / folder, ignore_errors=True)
    (target / "faults").mkdir(parents=True)
    import_model(source, target / "sound.apr", dtype="f32", overwrite=True)
    summary = write_oracle(OracleRequest(source, prompt=ORACLE_PROMPT), target / "oracle")
    print(f"oracle: {summary.count} tensors, tokens {summary.tokens}")
    plant_faults(target)
    size_bytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {size_bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
