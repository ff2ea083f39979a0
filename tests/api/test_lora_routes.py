"""LoRAs as input over HTTP: listed, shared, resized, combined, added, fitted, and their runs deleted."""

import pytest
import torch
from lora_files import dense, distance, energy, write, write_related
from safetensors.torch import load_file
from tiny_family import layers_of


@pytest.fixture
def loras(root):
    """Names of LoRAs in the host's folder, two of them in a folder of their own."""
    folder = root / "Lora"
    (folder / "sub").mkdir(parents=True)
    paths = write_related(folder, count=4)
    return [path.name for path in paths[:2]] + [
        f"sub/{path.rename(folder / 'sub' / path.name).name}" for path in paths[2:]
    ]


@pytest.fixture
def shared(client, loras):
    """A run of the first three."""
    body = {"loras": loras[:3], "name": "few", "ranks": [6, 3], "iterations": 3}
    code, job = client.post("/loras/share", body)
    assert code == 202
    job = client.ended(job)
    assert (job["outcome"], job["run"]) == ("done", "few"), job["message"]
    return "few"


def done(client, path, body):
    """Returns the result of a job."""
    code, job = client.post(path, body)
    assert code == 202, job
    job = client.ended(job)
    assert job["outcome"] == "done", job["message"]
    return job["result"]


def test_loras_are_listed_and_inspected(client, root, loras):
    (root / "Lora" / "broken.safetensors").write_bytes(b"no LoRA")
    code, answer = client.get("/loras")
    assert code == 200
    rows = {row["name"]: row["size"] for row in answer["loras"]}
    assert rows.keys() == {"broken.safetensors", *loras}
    assert rows[loras[3]] == (root / "Lora" / loras[3]).stat().st_size
    code, answer = client.post("/loras/inspect", {"loras": [loras[2], "broken.safetensors"]})
    assert code == 200
    good, bad = answer["loras"]
    assert (good["family"], good["problem"]) == ("Stable Diffusion 1.x", None)
    assert good["rank"] > 0
    assert "broken.safetensors" in bad["problem"]


def test_loras_are_shared_and_one_more_is_fitted(client, loras, shared):
    code, answer = client.get("/runs")
    assert [(run["name"], run["kind"]) for run in answer["runs"]] == [("few", "loras")]
    assert answer["runs"][0]["checkpoints"] == ["lora0", "lora1", "lora2"]
    body = {"run": shared, "lora": loras[3], "name": "later", "topup": 2}
    code, job = client.post("/loras/fit", body)
    assert code == 202
    assert client.ended(job)["run"] == "few"
    code, run = client.get("/runs/few")
    assert code == 200
    assert (run["kind"], run["hyper_model"], run["hyper_model_title"]) == ("loras", "", None)
    assert run["checkpoints"][0]["prompt"].startswith("<lora:few_0-6:")
    (fit,) = run["fits"]
    assert (fit["name"], fit["topups"]) == ("later", ["few_fit-later-2"])
    assert fit["prompt"].endswith("<lora:few_fit-later-2:1.00000>")
    assert fit["explained_with_topups"] > fit["explained"]
    code, answer = client.post("/loras/fit", {**body, "topup": "all"})
    assert (code, "topup" in answer["detail"]) == (400, True)
    code, answer = client.post("/loras/fit", {**body, "overwrite": True})
    assert client.ended(answer)["outcome"] == "done"


def test_a_name_is_suggested_that_nothing_has(client, root, loras):
    names = []
    for _ in range(2):
        code, job = client.post("/loras/share", {"loras": loras, "ranks": [2], "iterations": 1})
        assert code == 202
        names.append(client.ended(job)["run"])
    assert names == ["hyper-lora0-4", "hyper-lora0-4-2"]


def test_a_run_of_loras_is_deleted_without_its_inputs(client, root, loras, shared):
    code, answer = client.http.delete(f"/hyper-merge/runs/{shared}"), None
    answer = code.json()
    assert code.status_code == 200
    assert "few_0-6.safetensors" in answer["files"]
    left = {x.relative_to(root / "Lora").as_posix() for x in (root / "Lora").rglob("*.safetensors")}
    assert left == set(loras)
    assert client.get("/runs/few")[0] == 404


def test_a_run_of_loras_is_told_where_one_of_checkpoints_is_needed(client, shared):
    code, answer = client.post("/restore", {"run": shared, "shares": {"lora0": 1}})
    assert code == 404
    assert "the run few shares LoRAs" in answer["detail"]


def test_a_lora_is_resized(client, root, loras):
    result = done(client, "/loras/resize", {"lora": loras[0], "rank": 2, "name": "small"})
    path = root / "Lora" / "small.safetensors"
    assert (result["name"], result["rank"], result["size"]) == ("small", 2, path.stat().st_size)
    before, after = dense(root / "Lora" / loras[0]), dense(path)
    lost = distance(before, after) / energy(before)
    assert result["kept"] == pytest.approx(1 - lost, abs=1e-3)
    assert set(result["parts"]) == {"unet", "text_encoder"}


def test_loras_are_combined_with_their_multipliers(client, root, loras):
    body = {"loras": [loras[0], loras[2]], "multipliers": [1, -0.5], "name": "both"}
    assert done(client, "/loras/combine", body)["kept"] == pytest.approx(1, abs=1e-5)
    one, other, both = (
        dense(root / "Lora" / name) for name in (loras[0], loras[2], "both.safetensors")
    )
    wanted = {module: one[module] - 0.5 * other[module] for module in one}
    assert distance(both, wanted) / energy(wanted) < 1e-4


def test_loras_are_combined_with_their_weights_by_block(client, root, loras):
    blocks = [[0] * 17, "lbw=" + ",".join(["2"] * 26), 0.5]
    body = {"loras": loras[:3], "block_weights": blocks, "name": "three"}
    done(client, "/loras/combine", body)
    _, one, other, all_three = (
        dense(root / "Lora" / name) for name in (*loras[:3], "three.safetensors")
    )
    wanted = {module: 2 * one[module] + 0.5 * other[module] for module in one}
    assert distance(all_three, wanted) / energy(wanted) < 1e-4


def test_a_checkpoint_takes_a_lora_and_gives_it_back(client, root):
    path = root / "Stable-diffusion" / "a.safetensors"
    layer = layers_of(path)[0]
    state = {
        f"{layer.module}.lora_up.weight": torch.ones(layer.up_shape(1)),
        f"{layer.module}.lora_down.weight": torch.ones(layer.down_shape(1)),
    }
    (root / "Lora").mkdir()
    write(root / "Lora" / "one.safetensors", state)
    body = {"checkpoint": "a.safetensors", "loras": ["one.safetensors"], "multipliers": [0.25]}
    body["block_weights"] = [2]
    assert done(client, "/loras/add", {**body, "name": "more"})["file"] == "more.safetensors"
    more = load_file(path.with_name("more.safetensors"))[layer.key]
    torch.testing.assert_close(
        more.float(), load_file(path)[layer.key].float() + 0.5, atol=2e-3, rtol=0
    )
    body = {**body, "checkpoint": "more.safetensors", "name": "less"}
    assert done(client, "/loras/subtract", body)["layers"] == 1
    less = load_file(path.with_name("less.safetensors"))[layer.key]
    torch.testing.assert_close(less, load_file(path)[layer.key], atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("share", {"loras": ["lora0.safetensors"], "ranks": [2]}, "loras: Fewer than two LoRAs"),
        ("share", {"loras": ["lora0.safetensors", "x"], "ranks": [2]}, "host's list, got 'x'"),
        ("share", {"loras": "{all}", "ranks": [2], "budget": "1MB"}, "one of ranks"),
        ("share", {"loras": "{all}", "ranks": [2], "layer_weights": "odd"}, "layer_weights"),
        ("resize", {"lora": "lora0.safetensors"}, "one of rank, size and keep"),
        ("resize", {"lora": "../x", "rank": 2}, "host's list"),
        ("resize", {"lora": "lora0.safetensors", "rank": 2, "name": "../x"}, "name"),
        ("combine", {"loras": "{all}", "multipliers": [1]}, "multipliers"),
        ("combine", {"loras": "{all}", "block_weights": ["1"]}, "block_weights"),
        ("combine", {"loras": []}, "one LoRA or more"),
        ("add", {"checkpoint": "a.safetensors", "loras": "{all}", "block_weights": [1]}, "4 texts"),
        ("add", {"checkpoint": "x", "loras": "{all}"}, "checkpoint"),
        ("fit", {"run": "gone", "lora": "lora0.safetensors"}, "no run of LoRAs"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_at_once(client, jobs, loras, path, body, words):
    body = {key: loras if value == "{all}" else value for key, value in body.items()}
    code, answer = client.post(f"/loras/{path}", body)
    assert code in (400, 404)
    assert words in answer["detail"]
    assert not jobs.known
