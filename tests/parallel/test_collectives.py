"""What devices send each other: read from a program's text, and of the update over each mesh."""

import json
import subprocess
import sys

import pytest

from benchmarks.collectives import LENGTH, ROWS, STUDENT, TEACHER, TOP_K
from kd_jax.parallel import collectives
from kd_jax.parallel.collectives import Collective

TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %a = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  ROOT %gather.1 = bf16[4,8]{1,0} all-gather(%a), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %w = (s32[], bf16[4,8]{1,0}) while(%p), condition=%more, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %r = (s32[], /*index=1*/bf16[4,8]{1,0}) all-reduce(%w), channel_id=2, replica_groups=[1,8]<=[8], to_apply=%add
}

%more (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: f32[16,3]) -> f32[2,3] {
  %a = f32[16,3]{1,0} parameter(0)
  %w = (s32[], bf16[4,8]{1,0}) while(%a), condition=%more, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %c = pred[7]{0} collective-permute(%a), channel_id=4, source_target_pairs={{0,1},{1,0}}
  ROOT %s = f32[2,3]{1,0} reduce-scatter(f32[16,3]{1,0} %a), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
}
"""


def test_loops_count_as_often_as_they_go_round():
    found = set(collectives.read(TEXT))
    assert found == {
        Collective("all-gather", (("bf16", (4, 8)),), 15, "[4,2]<=[8]"),
        Collective("all-reduce", (("s32", ()), ("bf16", (4, 8))), 3, "[1,8]<=[8]"),
        Collective("collective-permute", (("pred", (7,)),), 1, "{{0,1},{1,0}}"),
        Collective("reduce-scatter", (("f32", (16, 3)),), 1, "[1,8]<=[8]"),
    }
    assert collectives.totals(found) == {
        "all-gather": 15 * 64, "all-reduce": 3 * (4 + 64), "collective-permute": 7, "reduce-scatter": 192,
        "all-to-all": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{}", [range(8)]),
        ("{{0,3},{1,2}}", [[0, 3], [1, 2]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("[4,2]<=[2,2,2]T(2,1,0)", [[0, 4], [2, 6], [1, 5], [3, 7]]),
        ("mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=2,'b'=2,'c'=2] {'a', 'c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ],
)
def test_devices_that_communicate(text, groups):
    line = f"  %a = f32[2]{{0}} all-reduce(%b), channel_id=1, replica_groups={text}, use_global_device_ids=true"
    (found,) = collectives.read(f"ENTRY %main (a: f32[2]) -> f32[2] {{\n{line}\n}}")
    assert found.groups == text
    assert collectives.members(text, 8).tolist() == [list(group) for group in groups]


def test_groups_in_an_unknown_form():
    with pytest.raises(ValueError, match="form that is not known"):
        collectives.members("", 8)


@pytest.mark.parametrize(
    ("kind", "groups", "slices", "wanted"),
    [
        # 40 bytes in groups of two; each slice sends its sum once, of each group
        ("all-reduce", "[4,2]<=[8]", 2, 0),
        ("all-reduce", "[4,2]<=[2,4]T(1,0)", 2, 4 * 2 * 40 / 8),
        # all devices: two slices send the array halved, twice (scatter and gather); four send three quarters, twice
        ("all-reduce", "{}", 2, 2 * (2 * 40 / 2) / 8),
        ("all-reduce", "{}", 4, 4 * (2 * 40 * 3 / 4) / 8),
        ("all-gather", "{}", 4, 4 * (40 * 3 / 4) / 8),
        ("reduce-scatter", "{}", 2, 2 * (40 / 2) / 8),
        # half of what a device has is for devices of the other slice
        ("all-to-all", "{}", 2, 40 / 2),
        ("collective-permute", "{{0,1},{3,4},{7,0}}", 2, 2 * 40 / 8),
    ],
)
def test_bytes_between_slices(kind, groups, slices, wanted):
    part = Collective(kind, (("f32", (5,)),), 2, groups)
    assert collectives.between_slices([part], devices=8, slices=slices) == pytest.approx(wanted)


def test_a_loop_that_nobody_knows_the_end_of():
    with pytest.raises(ValueError, match="all-gather in inner"):
        collectives.read(TEXT.replace('"known_trip_count":{"n":"5"}', ""))


@pytest.fixture(scope="module")
def found():
    """Collectives of the update by policy and mesh."""
    rows = {}
    for policy, meshes in {
        "training": ["2,1,1", "8,1,1", "1,2,1", "1,8,1", "2,1,2", "4,1,2", "1,1,8", "2,2,2"],
        # the last teacher lies otherwise than its student
        "online": ["2,1,1", "8,1,1", "2,2,2", "4,2,1,1,1,8"],
        "sampling": ["8,1,1", "1,8,1", "1,1,8", "2,2,2"],
        "truncated": ["8,1,1", "1,8,1", "1,1,8", "2,2,2"],
        "scoring": ["8,1,1", "1,2,1", "1,8,1", "1,1,8", "2,2,2"],
        "top_k": ["8,1,1", "1,8,1", "1,1,8", "2,2,2"],
        "mixtures": ["8,1,1"],
    }.items():
        command = [sys.executable, "-m", "benchmarks.collectives", "--json", policy, *meshes]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        for line in done.stdout.splitlines():
            _, sizes, parts = json.loads(line)
            shapes = [[(dtype, tuple(sizes)) for dtype, sizes in part["shapes"]] for part in parts]
            rows[policy, tuple(sizes)] = [
                Collective(part["kind"], tuple(own), part["times"], part["groups"])
                for part, own in zip(parts, shapes, strict=True)
            ]
    return rows


def sizes(found, policy, *mesh):
    return collectives.totals(found[policy, mesh])


def matrices(architecture):
    """Weights of the layers without the norms, and of the embedding."""
    a = architecture
    queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    layer = 2 * a.hidden_size * (queries + keys) + 3 * a.hidden_size * a.intermediate_size
    return a.num_hidden_layers * layer, a.vocab_size * a.hidden_size


@pytest.mark.long
@pytest.mark.parametrize(
    ("policy", "few", "many"),
    [
        ("training", (2, 1, 1), (8, 1, 1)),
        ("training", (1, 2, 1), (1, 8, 1)),
        ("training", (2, 1, 2), (4, 1, 2)),
        ("online", (2, 1, 1), (8, 1, 1)),
        ("scoring", (1, 2, 1), (1, 8, 1)),
    ],
)
def test_nothing_grows_with_the_devices_that_rows_are_split_over(found, policy, few, many):
    before, after = (sizes(found, policy, *mesh) for mesh in (few, many))
    assert sum(before.values()) > 1e5
    for kind in collectives.KINDS:
        assert after[kind] <= before[kind] * 1.01 + 64, (kind, before, after)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["training", "online"])
def test_data_parallel_sends_gradients_once_and_nothing_else(found, policy):
    layers, embedding = matrices(STUDENT)
    # of the tied embedding as the table and as the head
    gradients = 4 * (layers + 2 * embedding)
    for mesh in ((2, 1, 1), (8, 1, 1)):
        there = sizes(found, policy, *mesh)
        assert gradients <= there.pop("all-reduce") <= 1.02 * gradients
        assert not any(there.values())


@pytest.mark.slow
def test_fsdp_gathers_weights_and_never_activations(found):
    layers, embedding = matrices(STUDENT)
    there = sizes(found, "training", 1, 8, 1)
    # forward and backward, and the embedding as the table and as the head
    assert there["all-gather"] <= 1.02 * 4 * (2 * layers + 2 * embedding)
    assert there["all-reduce"] <= 1.02 * 4 * (layers + 2 * embedding)
    assert there["all-to-all"] + there["collective-permute"] < 1e4


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 1, 2), (4, 1, 2), (2, 2, 2)])
def test_two_slices_send_each_other_the_gradients_once(found, mesh):
    layers, embedding = matrices(STUDENT)
    parts, count = found["training", mesh], mesh[0] * mesh[1] * mesh[2]
    sent = collectives.between_slices(parts, devices=count, slices=2)
    # however many devices share the work, and however weights are split over fsdp and tensor
    assert sent * count == pytest.approx(2 * 4 * (layers + 2 * embedding), rel=0.03)
    # weights and activations stay in a slice: only sums over data leave it
    others = [part for part in parts if part.kind != "all-reduce"]
    assert collectives.between_slices(others, devices=count, slices=2) == 0


@pytest.mark.slow
def test_tensor_sends_activations_whose_size_does_not_grow(found):
    layers = STUDENT.num_hidden_layers
    one = 4 * ROWS * LENGTH * STUDENT.hidden_size
    there = sizes(found, "training", 1, 1, 8)
    # of a layer: out of attention and MLP; back through q, k, v, gate and up. Of the ends: the lookup, the head.
    assert there["all-reduce"] <= 1.1 * one * (7 * layers + 2)
    assert sum(there.values()) - there["all-reduce"] < 1e4


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["scoring", "top_k"])
def test_rows_are_scored_without_a_word(found, policy):
    assert sum(sizes(found, policy, 8, 1, 1).values()) == 0
    # weights that fsdp splits are gathered once
    layers, embedding = matrices(STUDENT)
    there = sizes(found, policy, 1, 8, 1)
    assert there["all-gather"] == sum(there.values()) <= 1.02 * 4 * (layers + 2 * embedding)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["sampling", "truncated"])
def test_a_step_of_sampling_sends_a_number_for_each_slot(found, policy):
    # which sample a slot begins; weights that fsdp splits were gathered before the first step
    for mesh in ((8, 1, 1), (1, 8, 1)):
        assert sum(sizes(found, policy, *mesh).values()) <= 4 * 8 * ROWS + 64


@pytest.mark.slow
def test_a_step_of_sampling_over_tensor(found):
    a = STUDENT
    # out of attention and MLP of each layer, and the lookup; a block of probabilities and the sums of all blocks
    wanted = 4 * ROWS * ((2 * a.num_hidden_layers + 1) * a.hidden_size + 128 + a.vocab_size // 128)
    assert sum(sizes(found, "sampling", 1, 1, 8).values()) <= wanted + 4 * ROWS * 50
    # of truncation, so many candidates of each part, and a few sums for each bit of a bisection
    candidates = 4 * ROWS * 256
    assert sum(sizes(found, "truncated", 1, 1, 8).values()) <= wanted + 8 * candidates + 4 * ROWS * 150


@pytest.mark.slow
def test_a_teachers_top_k_over_tensor(found):
    # k ids and values of each part, and one for the tail, of all positions; in chunks that are not all full
    positions = 1.2 * ROWS * LENGTH
    assert sizes(found, "top_k", 1, 1, 8)["all-gather"] <= 8 * (4 + 4) * (TOP_K + 1) * positions


@pytest.mark.slow
def test_mixtures_say_whether_they_have_converged(found):
    # a bit for each round of a loop
    assert {part.shapes for part in found["mixtures", (8, 1, 1)]} == {(("pred", ()),)}


@pytest.mark.slow
def test_nobody_sends_logits(found):
    for (policy, mesh), parts in found.items():
        for part in parts:
            for _, shape in part.shapes:
                assert not is_logits(shape), (policy, mesh, part)


def is_logits(shape):
    """Whether an array has the vocabulary, or what a device has of it, and is no head, nor a part of one."""
    vocab = {STUDENT.vocab_size // parts for parts in (1, 2, 4, 8)}
    widths = {a.hidden_size // parts for a in (STUDENT, TEACHER) for parts in (1, 2, 4, 8)}
    rest = [size for size in shape if size not in vocab and size != 1]
    return len(rest) < sum(size != 1 for size in shape) and not (len(rest) == 1 and rest[0] in widths)


def test_what_logits_are():
    assert is_logits((4, 36, 3072)) and is_logits((144, 384)) and is_logits((3072,))
    assert not is_logits((3072, 96)) and not is_logits((1, 384, 88)) and not is_logits((72, 224))
