"""Residual blocks for models that are layers in a row."""

from torch import Tensor, nn

__all__ = ["Residual"]


class Residual(nn.Sequential):
    """Layers in a row whose input is added to what they give: ``x + f(x)`` (He et al. 2015, arXiv:1512.03385).

    The last layer must give the shape that the first one gets. Parameters are named as in a Sequential.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """``input`` [n, ...] plus what the layers make of it."""
        x = input
        for layer in self:
            x = layer(x)
        return input + x
