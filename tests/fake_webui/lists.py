"""The lists of checkpoints and LoRAs, read from folders."""

import hashlib
import os
import re
from pathlib import Path
from types import SimpleNamespace


def files(folder, suffixes):
    """Returns files as the hosts walk: through links, hidden folders left out."""
    for place, _, names in sorted(os.walk(folder, followlinks=True)):
        for name in sorted(names):
            if Path(name).suffix.lower() in suffixes and "/." not in place:
                yield os.path.join(place, name)  # noqa: PTH118 - strings, as the hosts have them


class CheckpointInfo:
    """An entry of the list. Its title changes once the hash is known."""

    def __init__(self, filename, listing):
        self._listing = listing
        self.filename = filename
        self.is_safetensors = filename.lower().endswith(".safetensors")
        self.name = self._name()
        self.name_for_extra = Path(filename).stem
        self.model_name = os.path.splitext(re.sub(r"[/\\]", "_", self.name))[0]  # noqa: PTH122
        self.hash = legacy_hash(filename)
        self._knows(listing.hashes.get(listing.stamp(filename)))
        self.ids = [self.hash, self.model_name, self.title, self.name, self.name_for_extra]
        self.ids.append(f"{self.name} [{self.hash}]")
        self._more_ids()

    def _name(self):
        path = os.path.abspath(self.filename)  # noqa: PTH100
        for known in self._listing.folders():
            if path.startswith(os.path.abspath(known)):  # noqa: PTH100
                return path.replace(os.path.abspath(known), "").lstrip("/\\")  # noqa: PTH100
        return Path(path).name

    def _knows(self, sha256):
        self.sha256 = sha256
        self.shorthash = sha256[:10] if sha256 else None
        tail = f" [{self.shorthash}]" if sha256 else ""
        self.title, self.short_title = self.name + tail, self.name_for_extra + tail

    def _more_ids(self):
        if self.shorthash:
            self.ids += [self.shorthash, self.sha256, self.title, self.short_title]

    def register(self):
        self._listing.checkpoints_list[self.title] = self
        self._listing.checkpoint_aliases.update(dict.fromkeys(self.ids, self))

    def calculate_shorthash(self):
        """Hashes the file and gives the entry its new title, in the same place of the list."""
        sha256 = hashlib.sha256(Path(self.filename).read_bytes()).hexdigest()
        self._listing.hashes[self._listing.stamp(self.filename)] = sha256
        if self.sha256 == sha256:
            return self.shorthash
        old = self.title
        self._knows(sha256)
        self._more_ids()
        entries = list(self._listing.checkpoints_list.items())
        self._listing.checkpoints_list.clear()
        for title, info in entries:
            self._listing.checkpoints_list[self.title if title == old else title] = info
        self.register()
        return self.shorthash


def legacy_hash(filename):
    try:
        with Path(filename).open("rb") as file:
            file.seek(0x100000)
            return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
    except FileNotFoundError:
        return "NOFILE"


class Checkpoints:
    """The list and its aliases, for `modules.sd_models`."""

    def __init__(self, models, cmd_opts, opts, flavour):
        self.model_path = str(models / "Stable-diffusion")
        self.cmd_opts = cmd_opts
        self.opts = opts
        self.lazy = flavour in ("forge", "neo")
        self.checkpoints_list = {}
        self.checkpoint_aliases = {}
        self.hashes = {}  # the hosts keep theirs on disk: by file and time of change
        self.listed = 0  # how often, for tests

    @staticmethod
    def stamp(filename):
        stat = Path(filename).stat()
        return filename, stat.st_mtime_ns

    def folders(self):
        """Returns the folders with checkpoints: Neo takes several from its command line."""
        options = self.cmd_opts
        given = options.ckpt_dirs if hasattr(options, "ckpt_dirs") else [options.ckpt_dir]
        return [folder for folder in (*given, self.model_path) if folder]

    def checkpoint_tiles(self, use_short=False):
        attribute = "short_title" if use_short else "name" if self.lazy else "title"
        return [getattr(info, attribute) for info in self.checkpoints_list.values()]

    def list_models(self):
        self.listed += 1
        self.checkpoints_list.clear()
        self.checkpoint_aliases.clear()
        suffixes = {".safetensors", ".ckpt"} | ({".gguf"} if self.lazy else set())
        paths = (path for folder in self.folders() for path in files(folder, suffixes))
        for path in dict.fromkeys(paths):
            if not path.endswith((".vae.ckpt", ".vae.safetensors")):
                CheckpointInfo(path, self).register()

    def get_closet_checkpoint_match(self, search):
        if not search:
            return None
        if search in self.checkpoint_aliases:
            return self.checkpoint_aliases[search]
        infos = sorted(self.checkpoints_list.values(), key=lambda info: len(info.title))
        for text in (search, re.sub(r"\s*\[[^]]+]\s*$", "", search)):
            for info in infos:
                if text in info.title:
                    return info
        return None

    def select_checkpoint(self):
        """Returns the selected one, or the first, to which a stale title leads."""
        info = self.checkpoint_aliases.get(self.opts.data.get("sd_model_checkpoint"))
        if info is not None:
            return info
        if not self.checkpoints_list and not self.lazy:
            raise FileNotFoundError("No checkpoints found.")
        return next(iter(self.checkpoints_list.values()), None)


class Loras:
    """The built-in Lora extension's module, which is in `sys.modules` as `networks`."""

    def __init__(self, cmd_opts):
        self._cmd_opts = cmd_opts
        self.available_networks = {}
        self.loaded_networks = []

    def load_networks(self, names):
        """Loads the LoRAs of a picture: those that are not found are logged and left out."""
        if any(name not in self.available_networks for name in names):
            self.list_available_networks()
        known = [name for name in names if name in self.available_networks]
        self.loaded_networks[:] = [SimpleNamespace(mentioned_name=name) for name in known]

    def list_available_networks(self):
        Path(self._cmd_opts.lora_dir).mkdir(parents=True, exist_ok=True)
        paths = files(self._cmd_opts.lora_dir, {".pt", ".ckpt", ".safetensors"})
        self.available_networks = {Path(path).stem: path for path in paths}
