"""Names are the same on a retry, differ between runs, and are safe wherever they go."""

import re

from airflow_provider_raylm.naming import answers_fingerprint, application_name, fingerprint, submission_id
from airflow_provider_raylm.specs import BatchSpec, EngineSpec, Labels

LABELS = Labels(installation="a", dag_id="d", run_id="manual__2026-01-01T00:00:00+00:00", engine="e_1")


def test_an_application_belongs_to_one_run():
    """Any part of the owner makes another application; nothing of the run id is spelled out."""
    name = application_name(LABELS)
    others = [LABELS.model_copy(update={part: "other"}) for part in Labels.model_fields]

    assert re.fullmatch(r"raylm-e-1-[0-9a-f]{10}", name)
    assert len({application_name(labels) for labels in [LABELS, *others]}) == 5
    assert re.fullmatch(r"[a-z0-9-]+", application_name(LABELS.model_copy(update={"run_id": "../; rm -rf ~ \n"})))


def test_parts_cannot_be_shifted():
    """("ab", "c") and ("a", "bc") are two owners."""
    one = LABELS.model_copy(update={"dag_id": "ab", "run_id": "c"})
    two = LABELS.model_copy(update={"dag_id": "a", "run_id": "bc"})

    assert application_name(one) != application_name(two)


def test_a_fingerprint_tells_what_is_asked_not_how_long_to_wait():
    """Waiting times, budgets and block sizes do not make another engine or task."""
    engine = EngineSpec(name="e", model="m")
    batch = BatchSpec(source="s", prompt="p", output="o")

    assert fingerprint(engine) == fingerprint(engine.model_copy(update={"deploy_timeout": 5}))
    assert fingerprint(engine) != fingerprint(engine.model_copy(update={"model": "n"}))
    assert fingerprint(batch) == fingerprint(batch.model_copy(update={"block_rows": 5}))
    assert fingerprint(batch) != fingerprint(batch.model_copy(update={"temperature": 0.5}))


def test_a_submission_id_tells_task_content_and_attempt():
    """Equal for a retry of the same request; another for anything else."""
    task = ("d", "r", "group.label", 3)
    ids = {
        submission_id("infer", task, {"a": 1}, 1),
        submission_id("infer", task, {"a": 1}, 2),
        submission_id("infer", task, {"a": 2}, 1),
        submission_id("infer", ("d", "r", "group.label", 4), {"a": 1}, 1),
        submission_id("deploy", task, {"a": 1}, 1),
    }

    assert len(ids) == 5
    assert submission_id("infer", task, {"a": 1}, 1) in ids
    assert all(re.fullmatch(r"raylm-\w+-group-label-[0-9a-f]{12}-[12]", one) for one in ids)


def test_a_fingerprint_outlives_new_fields():
    """Written down before Step had typed answers, embeddings and adapters: outputs of then are resumed."""
    place = {"source": "s3://in/a", "output": "s3://out/b"}
    sampled = {"prompt": "x ${a}", "max_tokens": 5, "temperature": 0, "stop": ["a"], "top_k": 3, "seed": 4}
    messages = [{"role": "user", "content": "${a}"}]
    engine = EngineSpec(name="e", model="m")

    assert fingerprint(BatchSpec(**place, prompt="${a}")) == "e994477c29c9"
    assert fingerprint(BatchSpec(**place, **sampled, ignore_eos=True)) == "55938a614653"
    chat = BatchSpec(**place, messages=messages, extra_body={"chat_template_kwargs": {"x": 1}})
    assert fingerprint(chat) == "5e5faa35e8a8"
    assert (fingerprint(engine), answers_fingerprint(engine)) == ("2428bd21f1e1", "23ac4ce476bb")
