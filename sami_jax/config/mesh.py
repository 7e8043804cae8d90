"""The settings of the device mesh."""

import dataclasses

from sami_jax.config.fields import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices: data x fsdp x expert of them share the batch, fsdp x expert x tensor of them the weights."""

    data: int = setting(1, "copies of the weights", at_least=1)
    fsdp: int = setting(1, "devices that share the weights' embed axis and the batch", at_least=1)
    expert: int = setting(1, "devices that share the experts, else the embed axis, and the batch", at_least=1)
    tensor: int = setting(1, "devices that share heads, mlp and vocabulary", at_least=1)
