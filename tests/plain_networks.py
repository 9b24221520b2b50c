"""Small plain torch networks for the tests of correspondence: MLPs, convolutional nets, residual ones, transformers."""

import torch
from torch import nn
from torch.nn import functional as F


class MLP(nn.Module):
    def __init__(self, inputs=64, widths=(400, 200, 100), outputs=10, bias=True):
        super().__init__()
        sizes = [inputs, *widths]
        self.hidden = nn.ModuleList(nn.Linear(n, m, bias=bias) for n, m in zip(sizes, sizes[1:]))
        self.head = nn.Linear(sizes[-1], outputs, bias=bias)

    def forward(self, x):
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.head(x)


class Block(nn.Module):
    def __init__(self, n, m, stride, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(n, m, 3, stride, 1, bias=False), norm(m)
        self.conv2, self.norm2 = nn.Conv2d(m, m, 3, 1, 1, bias=False), norm(m)
        same = n == m and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(n, m, 1, stride, bias=False), norm(m))

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        y += self.skip(x)
        return F.relu(y)


class ResNet(nn.Module):
    def __init__(self, widths=(16, 32, 64), blocks=2, inputs=1, outputs=10, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(inputs, widths[0], 3, 1, 1, bias=False), norm(widths[0])
        made, n = [], widths[0]
        for stage, m in enumerate(widths):
            for number in range(blocks):
                made.append(Block(n, m, 2 if stage and not number else 1, norm))
                n = m
        self.blocks, self.head = nn.Sequential(*made), nn.Linear(n, outputs)

    def forward(self, x):
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class VGG(nn.Module):
    """Convolutions with biases, pooling, and a flatten of several positions into a linear layer."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1)),
            *(nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12 * 4, 20), nn.Tanh(), nn.Linear(20, 5)),
        )

    def forward(self, x):
        return self.net(x)


class Grouped(nn.Module):
    """Depthwise and grouped convolutions, a GroupNorm, a gate of channels."""

    def __init__(self):
        super().__init__()
        self.a, self.d, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, groups=12, padding=1), nn.Conv2d(12, 24, 1)
        self.g, self.c, self.n = nn.Conv2d(24, 16, 3, groups=4), nn.Conv2d(16, 12, 1), nn.GroupNorm(3, 12)
        self.s1, self.s2, self.m = nn.Linear(12, 6), nn.Linear(6, 12), nn.Conv2d(12, 24, 3, groups=12)
        self.out = nn.Linear(24, 4)

    def forward(self, x):
        x = self.b(F.relu(self.d(self.a(x))))
        x = F.relu(self.n(self.c(F.relu(self.g(x)))))
        gate = torch.sigmoid(self.s2(F.relu(self.s1(x.mean((2, 3))))))
        x = F.silu(self.m(x * gate[:, :, None, None]))
        return self.out(x.amax(dim=(2, 3)))


class Dense(nn.Module):
    """Concatenation, read whole and added to another tensor; a chunk; a shared module."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(10, 10, 1)
        self.bn, self.glu, self.out = nn.BatchNorm2d(10), nn.Conv2d(10, 14, 1), nn.Linear(7 * 16, 5)
        self.again = nn.Linear(5, 5)

    def forward(self, x):
        a = F.relu(self.a(x))
        both = torch.cat([a, torch.tanh(self.b(a))], 1)
        both = F.relu(self.bn(both + self.c(both)))
        up, gate = self.glu(both).chunk(2, 1)
        y = self.out((up * torch.sigmoid(gate)).reshape(x.size(0), -1))
        return self.again(torch.relu(self.again(y)))


class Shuffle(nn.Module):
    """A channel shuffle, written with view and transpose."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3, groups=2), nn.Conv1d(8, 4, 1)

    def forward(self, x):
        x = F.leaky_relu(self.b(self.a(x)))
        n, c, t = x.shape
        x = x.view(n, 2, c // 2, t).transpose(1, 2).reshape(n, c, t)
        return self.c(x).mean(-1)


class ViT(nn.Module):
    """Patches, a class token, positions, blocks of torch.nn, layer scale, attention written by hand."""

    def __init__(self, width=12, heads=3, norm_first=True):
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 17, width))
        self.layer = nn.TransformerEncoderLayer(width, heads, 20, 0.0, "gelu", batch_first=True, norm_first=norm_first)
        self.norm, self.attend = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)
        self.scale, self.qkv, self.o = nn.Parameter(torch.rand(width)), nn.Linear(width, 3 * width), nn.Linear(12, 12)
        self.head, self.heads = nn.Linear(width, 5), heads

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        x = self.layer(x)
        y = self.norm(x)
        x = x + self.scale * self.attend(y, y, y, need_weights=False)[0]
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = self.split(q), self.split(k), self.split(v)
        y = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        x = x + self.o(y.transpose(1, 2).reshape(x.shape[0], -1, 12))
        return self.head(x[:, 0])

    def split(self, x):
        return x.view(x.shape[0], -1, self.heads, 4).transpose(1, 2)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.back = nn.Embedding(30, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.norm(x + self.back(F.silu(self.inner(x)))))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gains, biases and running statistics as a trained network has them, not ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.dim() == 1:
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.data.copy_(noise + 0.5 if name.endswith(("weight", "var")) else 0.4 * noise - 0.2)
    return module.eval()


def image(channels, side, count=2, seed=1):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


CASES = {
    "mlp": (lambda: MLP(8, (10, 7)), image(1, 8)[:, 0, 0]),
    "resnet": (lambda: ResNet((6, 8), 1), image(1, 8)),
    "resnet_groupnorm": (lambda: ResNet((6, 8), 1, norm=lambda n: nn.GroupNorm(2, n)), image(1, 8)),
    "vgg": (VGG, image(3, 8)),
    "grouped": (Grouped, image(3, 8)),
    "dense": (Dense, image(3, 4)),
    "shuffle": (Shuffle, image(3, 8)[:, :, 0]),
    "vit": (ViT, image(1, 8)),
    "vit_post": (lambda: ViT(norm_first=False), image(1, 8)),
    "tied": (Tied, torch.tensor([[1, 4, 2], [9, 7, 7]])),
}


def network(case: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    made, example = CASES[case]
    return randomised(made(), seed), example
