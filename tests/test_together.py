"""The steps zip and least_squares: copies come back, own tails, widths, RegMean, nearer than the average; sentences."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from alignment.features.activations import inputs_of
from fusion import checkpoint, sources, words
from fusion._blocks import module_of
from fusion.data import encode
from fusion.job import Job
from fusion.plan import plan
from fusion.recipe import load
from tests.networks import NETWORKS, network
from tests.test_align_step import make, recipe_of, scrambled

IDS = torch.arange(4, 60)[None]
DATA = "data:\n  text: {path: ./t.txt, format: text, max_bytes: 400}\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """a, twin (a scrambled), b, near (a and noise), c, and tied, tied_b. A folder."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("a", "b", "c"):
        make(folder, name)
    for name in ("tied", "tied_b"):
        make(folder, name, tie_word_embeddings=True)
    scrambled(folder, "a", "twin")
    text = Path("recipes/data/austen.txt").read_text(encoding="utf-8")[20000:26000]
    (folder / "t.txt").write_text(text, encoding="utf-8")
    return folder


def run(folder: Path, step: str, tmp_path: Path, data: str = DATA) -> Path:
    """The directory that a step, written as in a recipe, leaves."""
    file = recipe_of(folder, f"  - {step}\n", data)
    planned = plan(load(file), tmp_path / "runs").steps[0]
    made = tmp_path / planned.name
    made.mkdir()
    words.load("steps", planned.step.verb)(Job(planned.name, made, load(file)), **planned.arguments)
    return made


def module(directory: Path):
    tensors = load_file(directory / "model.safetensors")
    return module_of(json.loads((directory / "config.json").read_text()), tensors, "cpu")


def logits(directory: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return module(directory)(ids).logits


def metrics(directory: Path) -> dict:
    return json.loads((directory / "metrics.json").read_text())


# ---------------------------------------------------------------------------------------------------------- zip


def test_a_scrambled_copy_zips_to_the_network_itself(models, tmp_path):
    made = run(models, "zip: {out: z, models: [a, twin], data: text}", tmp_path)
    torch.testing.assert_close(logits(made), logits(models / "a"), rtol=1e-3, atol=1e-4)
    found = metrics(made)
    assert found["layers.1.mlp"] == {
        "units": 24,
        "dead": 0,
        "of_all_networks": 24,
        "of_one_network": 0,
        "merged_within": 0,
    }
    assert found["until"] == 2 and found["tokens"] > 1000


def test_every_tensor_is_read_once(models, tmp_path, monkeypatch):
    seen = Counter()

    def region(source, name):
        seen[source.path, name] += 1
        return plain(source, name)

    plain = checkpoint.region
    monkeypatch.setattr(checkpoint, "region", region)
    run(models, "zip: {out: z, models: [a, twin, b], data: text}", tmp_path)
    assert len({path for path, _ in seen}) == 3 and set(seen.values()) == {1}


def test_each_keeps_its_own_layers_and_head(models, tmp_path):
    made = run(models, "zip: {out: z, models: [a, twin], data: text, until: 1, heads: keep}", tmp_path)
    for place, name in ((made, "a"), (made / "heads" / "twin", "twin")):
        torch.testing.assert_close(logits(place), logits(models / name), rtol=1e-3, atol=1e-4)
    made = run(models, "zip: {out: y, models: [a, b], data: text, until: 1, heads: keep, beta: 0}", tmp_path)
    one, other = (load_file(place / "model.safetensors") for place in (made, made / "heads" / "b"))
    own = load_file(models / "a" / "model.safetensors")
    for name, tensor in one.items():
        trunk = "layers.0" in name or "embed" in name
        assert tensor.equal(other[name]) is (trunk or name.endswith("norm.weight"))
        assert trunk or tensor.equal(own[name])
    assert metrics(made)["layers.0.mlp"]["merged_within"] == 0 and "layers.1.mlp" not in metrics(made)


def test_heads_of_other_classes_stay_their_owners(models, tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    for seed, (name, labels) in enumerate({"three": 3, "five": 5}.items()):
        torch.manual_seed(seed)
        config = BertConfig(**sizes, num_attention_heads=2, initializer_range=0.2, num_labels=labels)
        BertForSequenceClassification(config).save_pretrained(tmp_path / "in" / name)
    (tmp_path / "in" / "t.txt").write_text(" ".join(str(7 * one * one % 300) for one in range(500)))
    for step in (
        "least_squares: {out: z, models: [three, five], data: text}",
        "zip: {out: z, models: [three, five], data: text}",
    ):
        with pytest.raises(ValueError, match="classifier.bias is 3 in three and 5 in five: heads of other classes"):
            run(tmp_path / "in", step, tmp_path)
    made = run(tmp_path / "in", "zip: {out: z, models: [three, five], data: text, until: 1, heads: keep}", tmp_path)
    (made / "heads" / "five").rename(tmp_path / "in" / "kept")
    kept, own = (load_file(tmp_path / "in" / name / "model.safetensors") for name in ("kept", "five"))
    for key in ("classifier.weight", "classifier.bias"):  # the pooler's units change places and signs
        assert kept[key].shape == own[key].shape
        torch.testing.assert_close(kept[key].abs().sort().values, own[key].abs().sort().values)
    module(tmp_path / "in" / "kept")


def test_a_tied_head_is_kept_as_one_of_its_own(models, tmp_path):
    made = run(models, "zip: {out: z, models: [tied, tied_b], data: text, heads: keep}", tmp_path)
    assert json.loads((made / "config.json").read_text())["tie_word_embeddings"] is False
    tensors, own = (load_file(place / "model.safetensors") for place in (made, models / "tied"))
    assert tensors["lm_head.weight"].equal(own["model.embed_tokens.weight"])
    assert not tensors["model.embed_tokens.weight"].equal(own["model.embed_tokens.weight"])
    assert logits(made / "heads" / "tied_b").isfinite().all()


def plain(folder: Path, family: str, name: str, seed: int) -> Path:
    """A tiny random network without a tokenizer."""
    config, tensors, _ = network(family, 0, seed)
    (folder / name).mkdir(parents=True)
    save_file({key: one.float().contiguous() for key, one in tensors.items()}, folder / name / "model.safetensors")
    config["architectures"] = [NETWORKS[family][0]]
    (folder / name / "config.json").write_text(json.dumps(config))
    return folder / name


@pytest.fixture(scope="module")
def plains(tmp_path_factory) -> Path:
    """Networks without tokenizers, and numbers to read."""
    folder = tmp_path_factory.mktemp("plains")
    for family in ("gpt2", "bert", "mixtral", "vit"):
        for seed, name in enumerate((family, f"{family}_b")):
            plain(folder, family, name, seed)
    numbers = torch.randint(0, 61, (40, 60), generator=torch.Generator().manual_seed(0))
    (folder / "t.txt").write_text("\n\n".join(" ".join(map(str, row)) for row in numbers.tolist()))
    return folder


QUICK = ("gpt2", "bert", "opt")
OTHERS = sorted(set(NETWORKS) - {*QUICK, "vit"})


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERS)])
def test_copies_of_every_family_come_back(plains, tmp_path, family):
    """By zipping in other units, and by least squares; dead neurons (opt has some) are told by weights."""
    shutil.copy(plains / "t.txt", tmp_path)
    plain(tmp_path, family, "one", 0)
    shutil.copytree(tmp_path / "one", tmp_path / "same")
    scrambled(tmp_path, "one", "twin")
    ids = torch.arange(2, 30)[None]
    steps = ["least_squares: {out: solved, models: [one, same], data: text, max_length: 32}"]
    steps += ["zip: {out: zipped, models: [one, twin], data: text, max_length: 32}"] if family != "mixtral" else []
    for step in steps:
        (tmp_path / "runs").mkdir(exist_ok=True)
        made = run(tmp_path, step, tmp_path / "runs")
        torch.testing.assert_close(logits(made, ids), logits(tmp_path / "one", ids), rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------- least squares


@pytest.fixture(scope="module")
def kin(models) -> Path:
    """one and two: a, whose weights are large enough to matter, each with noise of its own."""
    make(models, "large", initializer_range=0.2)
    for seed, name in enumerate(("one", "two")):
        shutil.copytree(models / "large", models / name)
        generator = torch.Generator().manual_seed(seed)
        tensors = load_file(models / name / "model.safetensors")
        moved = {k: t + 0.06 * torch.randn(t.shape, generator=generator) for k, t in tensors.items()}
        save_file(moved, models / name / "model.safetensors", {"format": "pt"})
    return models


def test_nearer_the_ensemble_than_the_average(kin, tmp_path):
    text = Path("recipes/data/austen.txt").read_text(encoding="utf-8")[40000:42000]
    ids = torch.tensor(sources.load_tokenizer(kin / "one")(text)["input_ids"])[None, :400]
    wanted = (logits(kin / "one", ids) + logits(kin / "two", ids)) / 2
    error = {}
    for name, options in (("average", "ridge: 1.0e12"), ("mean", "inputs: mean"), ("merged", "width: 1.0")):
        made = run(
            kin, f"least_squares: {{out: {name}, models: [one, two], data: text, tokens: 1500, {options}}}", tmp_path
        )
        error[name] = float((logits(made, ids) - wanted).square().mean() / wanted.square().mean())
    assert error["merged"] < 0.4 * error["average"] and error["mean"] < 0.95 * error["average"], error


def test_with_own_inputs_it_is_regmean(kin, tmp_path):
    """Of the first layer's queries, by the formula: sum w W G over sum w G, with the inputs' Gram matrices."""
    step = "least_squares: {out: l, models: {one: 1, two: 3}, data: text, inputs: own, ridge: 0, max_length: 128}"
    made = run(kin, step, tmp_path)
    tokenizer = sources.load_tokenizer(kin / "one")
    documents = load(recipe_of(kin, "  - x: {}\n", DATA)), "text"
    ids = torch.cat(
        [torch.tensor(encode(tokenizer, one).ids) for one in Job("x", made, documents[0]).documents("text")]
    )
    rows = ids[: len(ids) // 128 * 128].view(-1, 128)
    name, top, bottom = "model.layers.0.self_attn.q_proj", 0, 0
    for share, model in ((0.25, "one"), (0.75, "two")):
        network = module(kin / model)
        x = inputs_of(network, rows, [name])[name].flatten(0, 1).double()
        top = top + share * network.get_submodule(name).weight.double() @ x.mT @ x
        bottom = bottom + share * x.mT @ x
    found = load_file(made / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(found.double(), (top @ torch.linalg.inv(bottom)).detach(), rtol=1e-3, atol=1e-4)
    assert metrics(made)["networks"] == {"one": 0.25, "two": 0.75}


def test_all_units_apart_are_both_networks_side_by_side(kin, tmp_path):
    """Networks that differ in the neurons of their last layer alone: both side by side give the weighted mean of
    what goes into the last norm."""
    shutil.copytree(kin / "large", kin / "other_neurons", dirs_exist_ok=True)
    tensors = load_file(kin / "large" / "model.safetensors")
    two = load_file(kin / "b" / "model.safetensors")
    tensors |= {name: 10 * two[name] for name in tensors if "layers.1.mlp" in name}
    save_file(tensors, kin / "other_neurons" / "model.safetensors", {"format": "pt"})
    streams = {}
    for width in (1.0, 1.5, 2.0):
        options = f"models: {{large: 1, other_neurons: 3}}, data: text, tokens: 500, width: {width}"
        made = run(kin, f"least_squares: {{out: w{width}, {options}}}", tmp_path)
        assert json.loads((made / "config.json").read_text())["intermediate_size"] == 24 * width
        streams[width] = made
    for name in ("large", "other_neurons"):
        streams[name] = kin / name

    def last(directory):
        return inputs_of(module(directory), IDS, ["model.norm"])["model.norm"]

    found = {name: last(directory) for name, directory in streams.items()}
    mean = 0.25 * found["large"] + 0.75 * found["other_neurons"]
    error = {width: float((found[width] - mean).norm() / mean.norm()) for width in (1.0, 1.5, 2.0)}
    assert error[2.0] < 1e-4 < error[1.5] < error[1.0], error


def routed(network, rows):
    """What the experts of the first layer read, and which experts each row goes to."""
    seen = []
    hook = network.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    with torch.no_grad():
        network(rows)
    hook.remove()
    return seen[0][0].detach().double(), seen[0][1]


def nearest(x, y, start, ridge=0.01):
    """The weights whose answers to x are nearest y, by lstsq, with rows that hold them near `start`."""
    held = (ridge * x.square().sum(0)).sqrt().diag()
    return torch.linalg.lstsq(torch.cat([x, held]), torch.cat([y, held @ start.double().mT])).solution.mT


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory) -> Path:
    """one, and two (one and noise): tiny Mixtrals, and 1,800 numbers to read."""
    folder = tmp_path_factory.mktemp("mixtures")
    for name in ("one", "two"):
        plain(folder, "mixtral", name, 0)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: one + 0.3 * one.std() * torch.randn(one.shape, generator=generator)
        for name, one in load_file(folder / "two" / "model.safetensors").items()
    }
    save_file(tensors, folder / "two" / "model.safetensors")
    numbers = torch.randint(0, 61, (30, 60), generator=generator)
    (folder / "t.txt").write_text("\n\n".join(" ".join(map(str, row)) for row in numbers.tolist()))
    return folder


def test_experts_are_solved_on_the_tokens_routed_to_them(mixtures, tmp_path):
    made = run(mixtures, "least_squares: {out: l, models: [one, two], data: text, max_length: 60}", tmp_path)
    rows = torch.tensor([list(map(int, line.split())) for line in (mixtures / "t.txt").read_text().split("\n\n")])
    merged, *both = (module(one) for one in (made, mixtures / "one", mixtures / "two"))
    x, chosen = routed(merged, rows)
    own = [routed(one, rows)[0] for one in both]
    solved, *experts = (one.model.layers[0].mlp.experts for one in (merged, *both))
    for expert in range(4):
        here = (chosen == expert).any(1)
        assert 200 < int(here.sum()) < 1800
        xs = [x[here], *(one[here] for one in own)]
        for stack in ("gate_up_proj", "down_proj"):
            found, *weights = (one.get_parameter(stack).detach()[expert].double() for one in (solved, *experts))
            y = sum(one @ weight.mT for one, weight in zip(xs[1:], weights)) / 2
            average = sum(weights) / 2
            torch.testing.assert_close(found, nearest(xs[0], y, average), rtol=1e-4, atol=1e-5)
            assert float((found - average).norm() / average.norm()) > 0.02
            pairs = [(one @ weight.mT).chunk(2, -1) for one, weight in zip(xs, [found, *weights])]
            xs = [torch.nn.functional.silu(gate) * up for gate, up in pairs]
    assert metrics(made)["too_few_tokens"] == {} and "model.layers.1.mlp.experts" in metrics(made)["moved"]


@pytest.mark.parametrize("inputs", ["mean", "own"])
def test_experts_that_few_tokens_reach_keep_the_average(mixtures, tmp_path, inputs):
    options = f"data: text, max_length: 60, tokens: 60, inputs: {inputs}"
    made = run(mixtures, f"least_squares: {{out: l, models: [one, two], {options}}}", tmp_path)
    few = metrics(made)["too_few_tokens"]
    named = {(name, int(expert)) for name, experts in few.items() for expert in experts}
    merged, *both = (module(one) for one in (made, mixtures / "one", mixtures / "two"))
    same = set()
    for layer in range(2):
        for stack in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{stack}"
            found, one, other = (network.get_parameter(name).detach() for network in (merged, *both))
            kept = (found - (one + other) / 2).abs().amax((1, 2)) < 1e-6
            same |= {(name, expert) for expert in kept.nonzero()[:, 0].tolist()}
            assert all(count < found.shape[2] for count in few.get(name, {}).values())
    assert named == same and 0 < len(named) < 16


def test_outputs_of_align_stand_for_their_donors(models, tmp_path):
    aligned = tmp_path / "b_aligned"
    aligned.mkdir()
    align = "  - align: {out: b_aligned, target: a, donor: twin}\n"
    step = "least_squares: {out: l, models: [a, twin], maps: b_aligned, data: text}"
    file = recipe_of(models, f"{align}  - {step}\n", DATA)
    planned = plan(load(file), tmp_path / "runs")
    words.load("steps", "align")(Job("b_aligned", aligned, load(file)), **planned["b_aligned"].arguments)
    assert planned["b_aligned"].key in planned["l"].inputs.values()
    made = tmp_path / "l"
    made.mkdir()
    words.load("steps", "least_squares")(
        Job("l", made, load(file), outputs={"b_aligned": aligned}), **planned["l"].arguments
    )
    torch.testing.assert_close(logits(made), logits(models / "a"), rtol=1e-3, atol=1e-4)
    assert metrics(made)["networks"] == {"a": 0.5, "b_aligned": 0.5}


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ("zip: {out: z, models: [a], data: text}", "zip.models: two models or more"),
        ("zip: {out: z, models: [a, a], data: text}", "'a' is given 2 times"),
        ("zip: {out: z, models: [a, b], data: text, alpha: 2}", "alpha: it is 2"),
        ("zip: {out: z, models: [a, b], data: text, until: 1}", "heads: from layer 1 on .* give heads: keep"),
        ("zip: {out: z, models: [a, b], data: text, until: 3, heads: keep}", "until: it is 3, and there are 2 layers"),
        ("zip: {out: z, models: [a, b], data: text, tokens: 20}", "20 tokens cannot tell 24 units of 'layers.0.mlp'"),
        (
            "zip: {out: z, models: [a, wide], data: text}",
            "'layers.0.mlp' has 24, 48 units; write wide in the sizes of a",
        ),
        ("zip: {out: z, models: [a, b, c], data: text, alpha: 0}", "alpha: with 0 .* one of 3 models has to"),
        ("zip: {out: z, models: [tied, a], data: text}", "a has a head of its own, and that of tied is tied; name a f"),
        ("least_squares: {out: l, models: [a, b], data: text, ridge: -1}", "ridge: it is -1"),
        ("least_squares: {out: l, models: [a, b], data: text, ridge: .nan}", "ridge: it is nan and must be a number"),
        ("least_squares: {out: l, models: {a: .inf, b: 1}, data: text}", "weights are numbers of at least 0"),
        ("least_squares: {out: l, models: {a: 0, b: 0}, data: text}", "weights are numbers of at least 0"),
        (
            "least_squares: {out: l, models: [a, b], data: text, width: 3}",
            "width: it is 3.0; 1 keeps no unit apart and 2",
        ),
        ("least_squares: {out: l, models: [a, b], data: text, width: 1.5, inputs: own}", "inputs: with 'own' every"),
        ("least_squares: {out: l, models: [a, b], maps: b, data: text}", "maps: 'b' is no output of an align step"),
        ("least_squares: {out: l, models: [a, b], data: text, tokens: 20}", "20 tokens cannot tell 24 units"),
        ("least_squares: {out: l, models: [a, b], data: text, inputs: theirs}", "inputs.*merged.*theirs"),
    ],
)
def test_bad_input_gets_a_sentence_while_planning(models, tmp_path, step, sentence):
    if not (models / "wide").exists():
        make(models, "wide", intermediate_size=48)
    file = recipe_of(models, f"  - {step}\n", DATA)
    with pytest.raises(ValueError, match=sentence):
        plan(load(file), tmp_path)


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (
            "zip: {out: z, models: [mixtral, mixtral_b], data: text}",
            "mixtral network has no units to zip.*within experts",
        ),
        ("least_squares: {out: l, models: [vit, vit_b], data: text, maps: x}", "there is no model 'x'"),
        ("least_squares: {out: l, models: [gpt2, bert], data: text}", "networks of other sizes"),
    ],
)
def test_architectures_that_do_not_fit(plains, tmp_path, step, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan(load(recipe_of(plains, f"  - {step}\n", DATA)), tmp_path)


@pytest.mark.parametrize(
    ("step", "text", "sentence"),
    [
        ("least_squares: {out: l, models: [vit, vit_b], data: text}", "1 2 3", r"vit: it looks at pictures \(vit\)"),
        (
            "zip: {out: z, models: [bert, bert_b], data: text}",
            "no numbers",
            "texts are token numbers below 61 .*'no nu",
        ),
        (
            "zip: {out: z, models: [bert, bert_b], data: text}",
            "1 2 3",
            "3 tokens cannot tell 40 units of 'layers.0.mlp'",
        ),
        ("least_squares: {out: l, models: [bert, bert_b], data: text}", "1 2 3", "3 tokens do not determine bert.enc"),
    ],
)
def test_data_that_do_not_do(plains, tmp_path, step, text, sentence):
    (plains / "other.txt").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        run(plains, step, tmp_path, DATA.replace("t.txt", "other.txt"))
