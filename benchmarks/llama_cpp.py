"""Sampling beside llama.cpp: the real SmolLM2-135M-Instruct, the same dequantised weights, 2 threads on each side.

    python -m venv /tmp/llama
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" \
      /tmp/llama/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
    .venv/bin/python -m benchmarks.llama_cpp --python /tmp/llama/bin/python             # from "The" to 128 tokens
    .venv/bin/python -m benchmarks.llama_cpp --python /tmp/llama/bin/python --length 512
    .venv/bin/python -m benchmarks.llama_cpp --python /tmp/llama/bin/python --batches 1 --kd_jax_batches 1 --samples 8

Building llama.cpp takes a compiler, CMake and some minutes, so it has an environment of its own. To use a libllama that
is already built, install the Python part with CMAKE_ARGS="-DLLAMA_BUILD=OFF" and set LLAMA_CPP_LIB_PATH to the folder
of the library when you run this. llama.cpp is driven through its low-level interface: a call takes one token of every
sequence; where a sequence ends, the next sample starts at once, and when no sample is left to start the batch shrinks.
Each of --batches and --draws is tried, and its best counts. First, greedy continuations of a few prompts are compared.
Both sides draw from the whole softmax at temperature 1; ours also keeps log-probabilities, which llama.cpp is not asked
for. With one sample at a time each token reads all weights: how many bytes a second that is stands beside the rate.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks.lm import SOURCE, memory

THREADS = 2
PROMPT, EOS = [504], 2  # "The", <|im_end|>
GREEDY = ("The capital of France is", "def fibonacci(n):", "Once upon a time", "Der Hund", "1, 2, 3, 4,", "Water is")
GREEDY_LENGTH = 64


# --- kd_jax -----------------------------------------------------------------------------------------------------------


def ours(count: int, length: int, batch: int) -> dict:
    from kd_jax.lm import decode, weights
    from kd_jax.runs import cache

    cache.enable_compilation_cache()  # as kd_jax.sample does
    model = weights.load(SOURCE)
    held = memory()

    def run(count, seed):
        made = 0
        for part in decode.stream(model, PROMPT, count, max_length=length, batch_size=batch, seed=seed):
            made += int((part.lengths - part.prompt_lengths).sum())
        return made

    run(batch, 1)  # compiles
    began = time.perf_counter()
    made = run(count, 0)
    return result(made, count, time.perf_counter() - began, batch, memory(peak=True) - held)


def greedy() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts as ids, and the same with our continuations."""
    from kd_jax.lm import decode, weights

    model = weights.load(SOURCE)
    prompts = [model.tokenizer.encode(text) for text in GREEDY]
    tokens, lengths, _ = decode.generate(
        model, prompts, len(prompts), max_length=GREEDY_LENGTH, sample_temperature=0.0, batch_size=len(prompts)
    )
    return prompts, [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


def convert(folder: str, kind: str) -> str:
    """A GGUF file of the same weights, in the same order of rows, and metadata, its matrices as F32 or F16."""
    import gguf
    from gguf.quants import dequantize, quantize

    from kd_jax.lm import weights

    reader = gguf.GGUFReader(weights.fetch(SOURCE))
    path = f"{folder}/{kind}.gguf"
    writer = gguf.GGUFWriter(path, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            inside = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inside)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if kind == "F32" else gguf.LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        # The vectors, gains of norms, stay F32 in llama.cpp's own conversions too.
        type_ = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        writer.add_tensor(tensor.name, quantize(values, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def theirs(path: str, cache: str, count: int, length: int, batch: int, draw: str) -> dict:
    model, vocab = loaded(path)
    held = memory()
    context = opened(model, cache, length, batch)
    drawn = DRAWS[draw](context, vocab)
    # A short run first: memory is touched and threads are started before the time counts.
    generate(context, [PROMPT] * batch, 8, batch, drawn)
    began = time.perf_counter()
    rows, drawing = generate(context, [PROMPT] * count, length, batch, drawn)
    took = time.perf_counter() - began
    made = sum(len(row) - len(PROMPT) for row in rows)
    out = result(made, count, took, batch, memory(peak=True) - held)
    return {**out, "draw": draw, "drawing": drawing / took}


def continued(path: str, cache: str, prompts: list[list[int]]) -> list[list[int]]:
    model, vocab = loaded(path)
    context = opened(model, cache, GREEDY_LENGTH, len(prompts))

    def draw(rows):
        return logits(context, rows, vocab).argmax(-1)

    return generate(context, prompts, GREEDY_LENGTH, len(prompts), draw)[0]


def loaded(path: str):
    """A model and the size of its vocabulary."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.use_mmap = False  # the weights are in memory at once, and are not counted as extra
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path}")
    return model, llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))


def opened(model, cache: str, length: int, batch: int):
    """A context for `batch` sequences of `length` tokens; `cache` is the type of its keys and values."""
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.n_ctx = batch * length
    params.n_batch = params.n_ubatch = params.n_seq_max = batch
    params.n_threads = params.n_threads_batch = THREADS
    # The faster choice of each: a separate cache per sequence, and flash attention only with an F16 cache.
    params.kv_unified = False
    params.flash_attn_type = int(cache == "F16")
    params.type_k = params.type_v = {"F32": llama_cpp.GGML_TYPE_F32, "F16": llama_cpp.GGML_TYPE_F16}[cache]
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp has no context for {batch} sequences of {length} tokens")
    return context


def generate(context, prompts, length: int, batch: int, draw) -> tuple[list[list[int]], float]:
    """The prompts with their continuations, and the seconds spent on drawing; draw(n) gives each of n rows a token."""
    import llama_cpp

    memory, call = llama_cpp.llama_get_memory(context), llama_cpp.llama_batch_init(batch, 0, 1)
    llama_cpp.llama_memory_clear(memory, False)
    out, step, drawing = [list(ids) for ids in prompts], 0, 0.0
    rows = [(index, 0) for index in range(min(batch, len(out)))]  # sequence s runs a sample, from a step on
    started = len(rows)
    while rows:
        decode(context, call, [(out[index][step - first], step - first) for index, first in rows])
        began = time.perf_counter()
        tokens = draw(len(rows))
        drawing += time.perf_counter() - began
        step += 1
        for s in reversed(range(len(rows))):
            index, first = rows[s]
            if step - first < len(out[index]):  # inside the prompt
                continue
            out[index].append(int(tokens[s]))
            if out[index][-1] != EOS and len(out[index]) < length:
                continue
            llama_cpp.llama_memory_seq_rm(memory, s, -1, -1)
            if started < len(out):
                rows[s], started = (started, step), started + 1
                continue
            # The last sequence moves to the place that is free: llama.cpp runs sequences without a gap as one piece.
            last = rows.pop()
            if s < len(rows):
                llama_cpp.llama_memory_seq_cp(memory, len(rows), s, -1, -1)
                llama_cpp.llama_memory_seq_rm(memory, len(rows), -1, -1)
                rows[s] = last
    llama_cpp.llama_batch_free(call)
    return out, drawing


def decode(context, call, rows: list[tuple[int, int]]) -> None:
    """Runs llama.cpp on one (token, position) of each sequence, and waits for it."""
    import llama_cpp

    call.n_tokens = len(rows)
    for s, (token, position) in enumerate(rows):
        call.token[s], call.pos[s], call.n_seq_id[s], call.seq_id[s][0], call.logits[s] = token, position, 1, s, 1
    if llama_cpp.llama_decode(context, call):
        raise RuntimeError("llama_decode failed")
    llama_cpp.llama_synchronize(context)


def logits(context, rows: int, vocab: int):
    """The logits of the last call [row, vocab]: a view, good until the next call."""
    import llama_cpp
    import numpy as np

    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (rows, vocab))


def by_sampler(context, vocab: int):
    """Draws by llama.cpp's own sampler from the whole distribution; each thread has a sampler for its share of rows."""
    import llama_cpp

    chains = []
    for seed in range(THREADS):
        chains.append(llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params()))
        llama_cpp.llama_sampler_chain_add(chains[-1], llama_cpp.llama_sampler_init_dist(seed))

    def part(thread, rows):
        return [llama_cpp.llama_sampler_sample(chains[thread], context, row) for row in rows]

    def draw(rows):
        llama_cpp.llama_get_logits_ith(context, 0)  # sorts the rows, once, before threads read them
        return in_parts(part, range(rows))

    return draw


def by_numpy(context, vocab: int):
    """Draws by the inverse of the cumulative distribution, over blocks, then inside one: no full running sum."""
    import numpy as np

    generators = [np.random.default_rng(seed) for seed in range(THREADS)]
    block = 256

    def part(thread, values):
        e = np.exp(values - values.max(-1, keepdims=True))
        e = e.reshape(len(e), vocab // block, block)
        sums = e.sum(-1).cumsum(-1)
        aim = generators[thread].random(len(e), np.float32) * sums[:, -1]
        # Rounding can put the aim past the last sum: the last entry then takes it.
        which = np.minimum((sums <= aim[:, None]).sum(-1), sums.shape[1] - 1)
        rows = np.arange(len(e))
        rest = aim - np.where(which > 0, sums[rows, which - 1], 0)
        inside = (e[rows, which].cumsum(-1) <= rest[:, None]).sum(-1)
        return which * block + np.minimum(inside, block - 1)

    return lambda rows: in_parts(part, logits(context, rows, vocab))


DRAWS = {"sampler": by_sampler, "numpy": by_numpy}
POOL = ThreadPoolExecutor(THREADS)


def in_parts(part, rows) -> list[int]:
    """Tokens of all rows: each thread runs part(thread, its share of the rows)."""
    cuts = [len(rows) * i // THREADS for i in range(THREADS + 1)]
    shares = [rows[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    return [token for out in POOL.map(part, range(THREADS), shares) for token in out]


# --- both -------------------------------------------------------------------------------------------------------------


def result(made: int, count: int, took: float, batch: int, extra: float) -> dict:
    return {"tokens_per_s": made / took, "mean": made / count, "seconds": took, "batch": batch, "extra_mib": extra}


SIDES = {"kd_jax": ours, "llama.cpp": theirs, "greedy": greedy, "continued": continued}


def side(name: str, python: str = sys.executable, **arguments):
    """What one of SIDES returns, in a process of its own."""
    command = [python, "-m", "benchmarks.llama_cpp", "--side", name, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def show(name: str, out: dict, size: int) -> dict:
    read = f", weights at {out['tokens_per_s'] * size / 1e9:.0f} GB/s" if out["batch"] == 1 else ""
    drawing = f", {out['drawing']:.0%} of the time drawing ({out['draw']})" if "drawing" in out else ""
    print(
        f"  {name:17} {out['tokens_per_s']:7.1f} tokens/s, batch {out['batch']}, {out['mean']:.1f} tokens a sample, "
        f"{out['seconds']:.0f} s, extra memory {out['extra_mib']:.0f} MiB{read}{drawing}",
        flush=True,
    )
    return out


def best(tried) -> float:
    return max(out["tokens_per_s"] for out in tried)


def agreement(prompts: list[list[int]], mine: list[list[int]], other: list[list[int]]) -> str:
    """How many greedy tokens are the same from the start."""
    same = total = 0
    for ids, a, b in zip(prompts, mine, other, strict=True):
        differ = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
        same += (differ[0] if differ else min(len(a), len(b))) - len(ids)
        total += len(a) - len(ids)
    return f"{same} of {total} greedy tokens after {len(prompts)} prompts are those of kd_jax"


def main(argv: list[str]) -> None:
    if argv[:1] == ["--side"]:
        print(json.dumps(SIDES[argv[1]](**json.loads(argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--length", type=int, default=128, help="of a sample at most, prompt included")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--kd_jax_batches", default="64,128", help="the best counts")
    parser.add_argument("--batches", default="32,64,128", help="llama.cpp's; the best counts")
    parser.add_argument("--draws", default="numpy,sampler", help="how llama.cpp's tokens are drawn; the best counts")
    parser.add_argument("--types", default="F32/F32,F32/F16,F16/F16", help="of llama.cpp's weights and cache")
    args = parser.parse_args(argv)
    types = [pair.split("/") for pair in args.types.split(",")]
    run = {"count": args.samples, "length": args.length}
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: convert(folder, kind) for kind in {weights for weights, _ in types}}
        print(f'{args.samples} samples from "The" to {args.length} tokens', flush=True)
        sizes = {kind: os.path.getsize(path) for kind, path in paths.items()}
        float32 = sizes.get("F32", 2 * sizes.get("F16", 0))  # ours, whatever llama.cpp's are
        batches = map(int, args.kd_jax_batches.split(","))
        mine = best(show("kd_jax", side("kd_jax", batch=batch, **run), float32) for batch in batches)
        prompts, continuations = side("greedy")
        for kind, cache in types:
            name, about = f"llama.cpp {kind}/{cache}", {"path": paths[kind], "cache": cache}
            others = side("continued", args.python, prompts=prompts, **about)
            print(f"  {name}: {agreement(prompts, continuations, others)}", flush=True)
            peer = best(
                show(name, side("llama.cpp", args.python, batch=int(batch), draw=draw, **about, **run), sizes[kind])
                for draw in args.draws.split(",")
                for batch in args.batches.split(",")
            )
            print(f"  kd_jax / {name}: {mine / peer:.2f}x the speed", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
