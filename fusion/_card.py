"""README.md of a run: a model card that Hugging Face's hub reads, with the recipe inside."""

from fusion._gather import Model, Report
from fusion._markdown import fence, front_matter, text
from fusion._pictures import duration
from fusion._verdict import JOINS

WHAT = {
    "target": "the model that was taught",
    "teacher": "a teacher",
    "baseline": "the same start and text, plain continued training",
    "fused": "made here",
    "other": "",
}


def card(report: Report) -> str:
    """The card as Markdown with YAML front matter; without a licence, because that follows from the sources'."""
    subject = report.result or report.hero or report.recipe
    sources = [model for model in report.models if model.source]
    verbs = {step.verb for step in report.steps}
    joins = not verbs.isdisjoint(JOINS)
    front: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    hubs = [
        str(model.source["hub"]) for model in sources if "hub" in model.source and model.role in ("target", "teacher")
    ]
    if hubs:
        front["base_model"] = hubs
        front["base_model_relation"] = "merge" if joins else "finetune"
    tags = ["fusion", *["knowledge-distillation"] * ("distill" in verbs), *["merge"] * joins]
    front["tags"] = tags
    parts = [
        front_matter(front),
        f"# {text(subject)}",
        " ".join(text(sentence) for sentence in report.verdict),
        "`result/` holds the checkpoint, `report.html` the pictures, `report.json` the numbers."
        if report.result or report.hero
        else "`report.html` holds the pictures, `report.json` the numbers.",
    ]
    if report.domains or any(model.scores.blimp_accuracy is not None for model in report.models):
        parts += ["## Results", _results(report)]
    parts += ["## How it was made", _made(report), fence(report.text)]
    if sources:
        parts += ["## Sources", "\n".join(_source(model) for model in sources)]
    parts += ["## Limits", _limits(report)]
    return "\n\n".join(parts) + "\n"


def _results(report: Report) -> str:
    """Bits per byte per domain, lower is better, and BLiMP."""
    blimp = any(model.scores.blimp_accuracy is not None for model in report.models)
    head = [
        "model",
        "what it is",
        *(f"{text(domain)}, bits per byte" for domain in report.domains),
        *(["BLiMP, %"] if blimp else []),
    ]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for model in report.models:
        scores = model.scores
        if not scores.bits_per_byte and scores.blimp_accuracy is None:
            continue
        cells = []
        for domain in report.domains:
            score = scores.bits_per_byte.get(domain)
            error = f" ± {score.stderr:.3f}" if score is not None and score.stderr else ""
            cells.append("" if score is None else f"{score.bits_per_byte:.3f}{error}")
        if blimp:
            cells.append("" if scores.blimp_accuracy is None else f"{100 * scores.blimp_accuracy:.1f}")
        lines.append([text(model.name), WHAT[model.role], *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _made(report: Report) -> str:
    steps = "; ".join(f"{step.verb} `{step.name}` ({duration(step.seconds)})" for step in report.steps)
    versions = ", ".join(
        dict.fromkeys(f"{name} {version}" for step in report.steps for name, version in step.versions.items())
    )
    said = f" Versions: {text(versions)}." if versions else ""
    return f"Steps: {steps}. Seed {report.seed}.{said}\n\n    {report.command}"


def _source(model: Model) -> str:
    words = "; ".join(f"{key} {text(value)}" for key, value in model.source.items())
    return f"* **{text(model.name)}** ({model.role}): {words}"


def _limits(report: Report) -> str:
    """What the numbers do not say."""
    limits = ["Bits per byte say how well a text is predicted, not how well a question is answered."]
    if report.domains:
        limits.append(f"Measured on {', '.join(text(domain) for domain in report.domains)} only.")
    if report.differences:
        limits.append("One seed: repeat the recipe with others before a small difference is believed.")
    limits.append("Licences and limits of the sources above hold for this model too.")
    return " ".join(limits)
