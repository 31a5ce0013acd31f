"""StableOPD inside TRL's own training loop; needs the extra `stableopd[trl]`."""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

# As in pyproject.toml: the versions with which the tests have been run.
SUPPORTED = SpecifierSet(">=1.14.2,!=1.15.0,<1.17")


def _require_trl() -> None:
    """Refuse a TRL whose methods are not those that are overridden here.

    Raises:
        ImportError: TRL is not installed, or in another version.
    """
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise ImportError(
            f"stableopd.integrations.trl needs trl{SUPPORTED}: pip install 'stableopd[trl]'."
        ) from None
    if not SUPPORTED.contains(found, prereleases=True):
        raise ImportError(
            f"stableopd.integrations.trl needs trl{SUPPORTED} and found {found}: "
            "pip install 'stableopd[trl]'."
        )


_require_trl()

from stableopd.integrations.trl.alarm import CollapseAlarm  # noqa: E402
from stableopd.integrations.trl.config import StableOPDConfig  # noqa: E402
from stableopd.integrations.trl.trainer import StableOPDTrainer  # noqa: E402

__all__ = ["CollapseAlarm", "StableOPDConfig", "StableOPDTrainer"]
