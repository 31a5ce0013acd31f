"""StableOPD inside TRL's own training loop; needs the extra `stableopd[trl]`."""

from stableopd.integrations.trl.alarm import CollapseAlarm
from stableopd.integrations.trl.config import StableOPDConfig
from stableopd.integrations.trl.trainer import StableOPDTrainer

__all__ = ["CollapseAlarm", "StableOPDConfig", "StableOPDTrainer"]
