"""Save a ResNet-18, then read one of its layers out of the file without loading the rest.

    python examples/example_resnet18.py [--offline]

The weights are the pretrained ones where the network gives them (45 MB, through torch.hub), and random ones elsewhere.
The network is defined below, with torchvision's names, so that torchvision is not needed.
"""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import zipslicer

PRETRAINED = "https://download.pytorch.org/models/resnet18-f37072fd.pth"


# ---------------------------------------------------------------- the network


class BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(x)) + shortcut).relu()


class ResNet18(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def resnet18(offline: bool) -> ResNet18:
    network = ResNet18()
    if not offline:
        socket.setdefaulttimeout(10)
        try:
            network.load_state_dict(torch.hub.load_state_dict_from_url(PRETRAINED, map_location="cpu", check_hash=True))
            print("pretrained weights, by torch.hub")
            return network
        except OSError as error:  # urllib's errors are OSErrors
            print(f"no network ({error}): random weights")
    return network


# ---------------------------------------------------------------- the example


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--offline", action="store_true", help="do not ask the network for the pretrained weights")
    network = resnet18(parser.parse_args().offline)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet18.pth"
        torch.save(network.state_dict(), path)

        # Somewhere else, later. Nothing is read here but the list of what the file holds ...
        state_dict = zipslicer.load(path)
        print(f"{path.name}: {len(state_dict)} tensors, {path.stat().st_size / 1e6:.1f} MB")

        # ... and here, nothing but the tensors that are asked for. They are ordinary tensors, with memory of their own.
        layer3 = {key: state_dict[key] for key in state_dict.keys() if key.startswith("layer3")}  # noqa: SIM118

        for key, tensor in layer3.items():
            print(f"  {key:32} {tuple(tensor.shape)!s:20} mean {tensor.float().mean():+.4f}")
        print(f"read {sum(tensor.nbytes for tensor in layer3.values()) / 1e6:.1f} MB, {len(layer3)} tensors")

        # They are what was saved; and a layer can run by itself.
        saved = network.layer3.state_dict()
        assert all(torch.equal(saved[key.removeprefix("layer3.")], tensor) for key, tensor in layer3.items())
        block = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        block.load_state_dict({key.removeprefix("layer3."): tensor for key, tensor in layer3.items()})
        with torch.inference_mode():
            print(f"layer3 alone turns (1, 128, 28, 28) into {tuple(block(torch.randn(1, 128, 28, 28)).shape)}")
        state_dict.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
