"""What is made of runs through the API: LoRAs, checkpoints, checks, pictures; and deleting a run."""

import pytest
from PIL import Image
from tiny_family import snapshot

from hyper_merge.hosts.host import GeneratorInfo
from hyper_merge.hosts.standalone import Standalone
from hyper_merge.operations.compare.compare import ImageGenerator
from hyper_merge.runtime.progress import Progress


def done(client, path, body):
    """Returns the job of a request once it is done."""
    code, job = client.post(path, body)
    assert (code, job["outcome"], job["result"]) == (202, "running", None), job
    job = client.ended(job)
    assert (job["outcome"], job["message"]) == ("done", ""), job
    return job


def test_a_checkpoint_and_a_mixture_are_restored(client, root, run):
    result = done(client, "/restore", {"run": "mix", "shares": {"a": 1}})["result"]
    assert result["file"] == "a-restored.safetensors"
    assert (root / "Stable-diffusion" / result["file"]).stat().st_size == result["size"]
    assert 0.2 < result["explained"] <= 1
    body = {"run": "mix", "shares": {"a": 0.5, "b": 0.25}, "name": "half", "dtype": "float32"}
    result = done(client, "/restore", body)["result"]
    assert (result["file"], result["dtype"]) == ("half.safetensors", "float32")
    assert (root / "Stable-diffusion/half.safetensors").exists()
    job = client.ended(client.post("/restore", body)[1])
    assert (job["outcome"], job["result"]) == ("refused", None)
    assert "half.safetensors exists" in job["message"]


def test_each_checkpoint_gets_one_lora(client, root, run):
    (lora,) = done(client, "/export", {"run": "mix", "checkpoints": ["b"]})["result"]["loras"]
    assert (lora["checkpoint"], lora["name"]) == ("b", "mix_b")
    assert (root / "Lora/mix_b.safetensors").stat().st_size == lora["size"]


def test_a_lora_is_extracted_from_two_checkpoints(client, root):
    body = {"base": "a.safetensors", "checkpoint": "sub/c.safetensors", "rank": 2, "device": "cpu"}
    result = done(client, "/extract", body)["result"]
    assert (result["name"], result["rank"]) == ("c-from-a", 2)
    assert (root / "Lora/c-from-a.safetensors").exists()


def test_the_check_of_originals_deletes_nothing(client, root, run):
    before = snapshot(root)
    result = done(client, "/safe", {"run": "mix", "threshold": "1%"})["result"]
    assert [row["restored_as"] for row in result["originals"]] == ["a", "b", "c"]
    assert all(row["safe"] for row in result["originals"])
    assert "path" not in result["originals"][0]
    assert result["frees"] > 0
    assert snapshot(root) == before


def test_a_run_absorbs_a_checkpoint(client, root, run):
    done(client, "/restore", {"run": "mix", "shares": {"a": 0.5, "b": 0.5}, "name": "d"})
    body = {"run": "mix", "checkpoints": ["d.safetensors"], "name": "four"}
    assert done(client, "/absorb", body)["run"] == "four"
    assert len(client.get("/runs/four")[1]["checkpoints"]) == 4


def test_an_average_is_made_alone(client, root):
    body = {"checkpoints": ["a.safetensors", "b.safetensors"], "name": "mean", "weights": [1, 3]}
    assert done(client, "/average", body)["result"]["file"] == "mean.safetensors"
    assert (root / "Stable-diffusion/mean.safetensors").exists()
    assert client.get("/runs")[1]["runs"] == []


@pytest.fixture
def draws(monkeypatch):
    """A host that draws grey pictures."""

    class Drawing:
        def __enter__(self):
            def draw(picture, progress):
                return Image.new("RGB", (64, 64), (len(picture.prompt) % 256,) * 3)

            return Progress(), ImageGenerator("Grey", draw, lambda path: "")

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(Standalone, "generator_info", lambda self: GeneratorInfo(("Euler",)))
    monkeypatch.setattr(Standalone, "drawing", lambda self, task: Drawing())


@pytest.mark.usefixtures("draws")
def test_pictures_are_compared(client, root, run):
    body = {"run": "mix", "prompts": ["a cat"], "width": 64, "height": 64, "checkpoints": ["a"]}
    result = done(client, "/compare", body)["result"]
    assert result["name"] == "comparison-1"
    assert [row["checkpoint"] for row in result["figures"]] == ["a"]
    assert list((root / "hyper-merge/mix").rglob("comparison-1.png"))


def test_a_run_is_deleted_with_its_files(client, root, run):
    code, answer = client.http.delete("/hyper-merge/runs/mix").status_code, None
    assert code == 200
    assert client.get("/runs/mix")[0] == 404
    assert not list((root / "Lora").glob("mix*"))
    assert (root / "Stable-diffusion/a.safetensors").exists()
    answer = client.http.delete("/hyper-merge/runs/mix")
    assert answer.status_code == 404


REFUSED = (
    ("/restore", {"run": "mix", "shares": {}}, "shares: expected one checkpoint or more"),
    ("/restore", {"run": "mix", "shares": {"a": 10**400}}, "shares: expected a number below"),
    ("/restore", {"run": "mix", "shares": {"a": 1}, "name": "../x"}, "name: "),
    ("/restore", {"run": "mix", "shares": {"a": 1}, "dtype": "int8"}, "dtype: "),
    ("/export", {"run": "mix", "rank": 0}, "rank: "),
    ("/extract", {"base": "../a", "checkpoint": "b.safetensors"}, "base: expected a name"),
    (
        "/extract",
        {"base": "a.safetensors", "checkpoint": "b.safetensors", "damaged": "maybe"},
        "damaged: expected one of refuse, accept",
    ),
    ("/safe", {"run": "mix", "threshold": "much"}, "threshold: expected a share"),
    ("/absorb", {"run": "mix", "checkpoints": ["/etc/passwd"]}, "checkpoints: expected a name"),
    ("/average", {"checkpoints": ["a.safetensors"], "name": "x"}, "checkpoints: a merge takes two"),
    ("/compare", {"run": "mix", "prompts": []}, "expected a prompt"),
    ("/compare", {"run": "mix", "prompts": ["x"], "sampler": "?"}, "sampler: expected a sampler"),
    ("/compare", {"run": "mix", "prompts": ["x"], "checkpoints": ["z"]}, ""),
)


@pytest.mark.usefixtures("draws", "run")
@pytest.mark.parametrize(("path", "body", "message"), REFUSED)
def test_what_is_wrong_is_refused_at_once(client, jobs, path, body, message):
    code, answer = client.post(path, body)
    assert code == 400
    assert answer["detail"].startswith(message)
    assert jobs.last is None


@pytest.mark.usefixtures("draws")
@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/restore", {"shares": {"a": 1}}),
        ("/export", {}),
        ("/safe", {}),
        ("/absorb", {"checkpoints": ["a.safetensors"]}),
        ("/compare", {"prompts": ["x"]}),
    ],
)
def test_an_unknown_run_is_not_found(client, path, more):
    assert client.post(path, {"run": "gone", **more})[0] == 404


def test_a_host_that_cannot_draw_says_so(client, run, monkeypatch):
    monkeypatch.setattr(
        Standalone, "generator_info", lambda self: GeneratorInfo(problem="install diffusers")
    )
    code, answer = client.post("/compare", {"run": "mix", "prompts": ["x"]})
    assert (code, answer["detail"]) == (400, "install diffusers")


def test_nothing_else_begins_while_a_job_runs(client, run, endless):
    body = {"checkpoints": ["a.safetensors", "b.safetensors"], "name": "new", "device": "cpu"}
    assert client.post("/merge", body)[0] == 202
    for path, other in (
        ("/safe", {"run": "mix"}),
        ("/average", body),
        ("/extract", {"base": "a.safetensors", "checkpoint": "b.safetensors"}),
    ):
        assert client.post(path, other)[0] == 409
    assert client.http.delete("/hyper-merge/runs/mix").status_code == 409
