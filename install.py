"""Run by the WebUI at every start, in its environment: sees that our imports are there.

The WebUI pins torch, numpy and Pillow; those are never installed or changed from here. Imports
nothing of the package, which needs what may be missing.
"""

import importlib.util

PINNED_BY_HOST = ("torch", "numpy", "PIL")
OURS = {"yaml": "pyyaml>=6", "tqdm": "tqdm>=4.65"}


def is_missing(module: str) -> bool:
    """Whether `module` cannot be imported here; it is looked up, not loaded."""
    return importlib.util.find_spec(module) is None


def install(requirements: list[str]) -> None:
    """Installs `requirements` through the WebUI, or says how to where there is none."""
    quoted = " ".join(f'"{requirement}"' for requirement in requirements)  # a shell reads it
    try:
        import launch  # noqa: PLC0415 - exists inside the WebUI only
    except ImportError:
        print(f"Hyper-Merge needs {quoted}; run: python -m pip install {quoted}")
        return
    launch.run_pip(f"install {quoted}", "requirements of Hyper-Merge")


def main() -> None:
    """Installs what is missing and ours; names what is missing and the host's."""
    absent = [module for module in PINNED_BY_HOST if is_missing(module)]
    if absent:
        print(
            f"Hyper-Merge: expected {', '.join(absent)} in the WebUI's environment, found nothing; "
            "start the WebUI once without --skip-install, which brings its own versions"
        )
    missing = [requirement for module, requirement in OURS.items() if is_missing(module)]
    if missing:
        install(missing)


if __name__ == "__main__":
    main()
