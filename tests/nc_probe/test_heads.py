"""The classifier of every timm module, and of other models: `weight @ feature + bias` is what they give."""

import warnings

import pytest
import timm
import torch
from torch import nn

import timm_deq  # noqa: F401  (registers its models)
from nc_probe import NCProbe, find_head
from nc_probe.hooks.captures import ClassifierInputCapture, OutputCapture

K = 7

# The smallest model of each module of timm, by parameters:
#   python -c "import timm, torch; m = timm.models._registry._module_to_models; [print(k, min((sum(p.numel() for p in
#   timm.create_model(n, device='meta').parameters()), n) for n in m[k])[1]) for k in sorted(m)]"
SMALLEST = """
beit:beit_base_patch16_224 byoanet:halonet_h1 byobnet:test_byobnet cait:cait_xxs24_224 coat:coat_tiny
convit:convit_tiny convmixer:convmixer_768_32 convnext:test_convnext cpubone:cpubone_nano crossvit:crossvit_tiny_240
csatv2:csatv2 cspnet:cs3darknet_focus_s cspnext:cspnext_tiny davit:davit_tiny deepseek_vit:deepseek_vit_412m
deit:deit_tiny_patch16_224 densenet:densenet121 dla:dla46x_c dpn:dpn48b edgenext:edgenext_xx_small
efficientformer:efficientformer_l1 efficientformer_v2:efficientformerv2_s0 efficientnet:test_efficientnet
efficientvim:efficientvim_m1 efficientvit_mit:efficientvit_b0 efficientvit_msra:efficientvit_m0
eva:vit_tiny_patch16_dinov3_qkvb fasternet:fasternet_t0 fastvit:fastvit_t8 focalnet:focalnet_tiny_srf
gcvit:gcvit_xxtiny gemma4_vit:gemma4_vit_167m ghostnet:ghostnet_050 hardcorenas:hardcorenas_b hgnet:hgnetv2_b0
hiera:hiera_tiny_224 hieradet_sam2:sam2_hiera_tiny hrnet:hrnet_w18_small iformer:iformer_t
inception_next:inception_next_atto inception_resnet_v2:inception_resnet_v2 inception_v3:inception_v3
inception_v4:inception_v4 lcnetv2:lcnetv2_small levit:levit_128s lowformer:lowformer_b0 mambaout:test_mambaout
maxxvit:test_coatnet metaformer:poolformerv2_s12 mlp_mixer:gmlp_ti16_224 mobilenetv3:mobilenetv3_small_050
mobilenetv5:mobilenetv5_base mobilevit:mobilevit_xxs mvitv2:mvitv2_tiny naflexvit:naflexvit_base_patch16_parfac_gap
nasnet:nasnetalarge nest:nest_tiny nextvit:nextvit_small nfnet:test_nfnet pit:pit_ti_224 pnasnet:pnasnet5large
pvt_v2:pvt_v2_b0 qwen3_vit:qwen3_vit_88m rdnet:rdnet_tiny regnet:regnetx_002 repghost:repghostnet_050 repvit:repvit_m1
res2net:res2next50 resnest:resnest14d resnet:test_resnet resnetv2:resnetv2_18 rexnet:rexnet_100 selecsls:selecsls42
senet:legacy_seresnet18 sequencer:sequencer2d_s shvit:shvit_s1 sknet:skresnet18 starnet:starnet_s050
swiftformer:swiftformer_xs swin_transformer:swin_tiny_patch4_window7_224 swin_transformer_v2:swinv2_tiny_window16_256
swin_transformer_v2_cr:swinv2_cr_tiny_224 tiny_vit:tiny_vit_5m_224 tnt:tnt_s_legacy_patch16_224 tresnet:tresnet_m
twins:twins_svt_small vgg:vgg11 visformer:visformer_tiny vision_transformer:test_vit
vision_transformer_hybrid:vit_tiny_r_s16_p8_224 vision_transformer_relpos:test_vit_relpos
vision_transformer_sam:samvit_base_patch16_224 vitamin:vitamin_small_224 volo:volo_d1_224 vovnet:ese_vovnet19b_slim_dw
xception:legacy_xception xception_aligned:xception41p xcit:xcit_nano_12_p8_224
"""

# Heads that the smallest models do not show: distilled ones, mixtures, MLP heads, attention pooling, convolutions.
OTHERS = """
caformer_s18 deit_tiny_distilled_patch16_224 deq_resnet8_cifar efficientvim_m1_dist iformer_m_distilled levit_conv_128s
pit_ti_distilled_224 resnet50_clip resnetv2_50x1_bit test_convnext2 test_vit2 test_vit3 vit_base_patch16_siglip_224
vit_small_patch16_36x1_224 vit_small_r26_s32_224
"""

# The logits of VOLO are those of the class token plus half of the maximum, over the other tokens, of a second head: no
# linear map of any feature. The probe reads the class token and its head, and says that this is not all.
NOT_LINEAR = "volo_d1_224"


def prepared(name, **arguments):
    """A model with random weights in its classifier, where many have zeros, and a small input for it."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=K, **arguments).eval()
    head = find_head(model)
    for linear in head.maps:
        nn.init.normal_(linear.module.weight)
        nn.init.normal_(linear.module.bias)
    for mixture in head.mixtures:
        nn.init.normal_(mixture)
    cfg = model.pretrained_cfg
    channels, full, _ = cfg["input_size"]
    least = max((cfg.get("min_input_size") or (0, 0, 0))[-1], 32)
    for size in (full,) if cfg.get("fixed_input_size") else (least, 64, 96, 160, full):
        x = torch.randn(2, channels, size, size)
        try:
            with torch.no_grad():
                return model, x, model(x)
        except (RuntimeError, AssertionError, ValueError):  # too small for its strides or windows
            assert size != full, name
    raise AssertionError(name)


def relative_error(model, x, logits):
    """Of weight @ feature + bias, by the parts that the search found."""
    head = find_head(model)
    capture = ClassifierInputCapture(head)
    handles = OutputCapture(model, [capture]).register()
    with torch.no_grad():
        model(x)
        found = capture.pop().double() @ head.weight.T + head.bias
    for handle in handles:
        handle.remove()
    return float((found - logits).abs().max() / logits.abs().max())


def test_the_list_has_every_module():
    pairs = [pair.split(":") for pair in SMALLEST.split()]
    ours = {"deq_resnet"}
    assert {module for module, _ in pairs} == set(timm.list_modules()) - ours
    assert len(pairs) == len(timm.list_modules()) - len(ours)
    assert all(name in timm.list_models(module=module) for module, name in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pair.split(":")[1] for pair in SMALLEST.split()] + OTHERS.split())
def test_the_linear_map_of_every_timm_module(name):
    model, x, logits = prepared(name)
    exact = name != NOT_LINEAR
    assert (relative_error(model, x, logits) < 1e-4) == exact
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught, NCProbe(model) as probe:
        warnings.simplefilter("always")
        model(x)
        probe.update(torch.arange(len(x)))
    assert len(caught) == (not exact) and (probe.linear_error < 1e-4) == exact
    report = probe.compute()
    assert report.samples == len(x) and len(report.heads) == (len(probe.head.maps) if len(probe.head.maps) > 1 else 0)
    if not exact:
        assert "is not what the model gives" in str(caught[0].message)
        with torch.no_grad():
            token = model.forward_head(model.forward_features(x), pre_logits=True)
            assert torch.equal(torch.cat([f for f, _ in probe.kept()]), token)


class Net(nn.Module):
    """torchvision-like: the classifier is `fc`, and a linear layer that it is not comes after it."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, 6)
        self.fc = nn.Linear(6, K, bias=bias)
        self.aside = nn.Linear(1, 1)

    def forward(self, x):
        return self.fc(self.stem(x))


class TimmNet(Net):
    def get_classifier(self):
        return self.fc


class Classifier(nn.Module):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


@pytest.mark.parametrize(
    "model, name",
    [
        (Net(), "fc"),
        (TimmNet(), "fc"),
        (nn.DataParallel(TimmNet()), "fc"),
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), "2"),
        (Classifier(classifier=nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), z=nn.Linear(1, 1)), "classifier.1"),
        (Classifier(backbone=Net(), head=nn.Linear(3, 2)), "head"),
        (nn.Linear(3, 2), ""),
    ],
)
def test_find_head(model, name):
    head = find_head(model)
    assert head.name == name
    inner = model.module if isinstance(model, nn.DataParallel) else model
    (linear,) = head.maps
    assert linear.module is dict(inner.named_modules())[name]


class TwoHeads(nn.Module):
    """DeiT-like: a head for each of two features, and the mean of their logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(7, 6)  # features of full rank: NC1 of others rests on rounding
        self.head, self.head_dist = nn.Linear(6, K), nn.Linear(6, K, bias=False)

    def forward(self, x):
        z = self.body(x)
        return (self.head(z) + self.head_dist(z.relu())) / 2


def test_the_mean_of_heads_and_each_of_them():
    x, labels = torch.randn(40, 7), torch.arange(40) % K
    net = TwoHeads().eval()
    with torch.no_grad(), NCProbe(net, head=["head", "head_dist"], groups={"some": [0, 1, 2]}) as probe:
        for xb, yb in zip(x.split(9), labels.split(9), strict=True):
            net(xb)
            probe.update(yb)
        z, logits = net.body(x).double(), net(x)
    report = probe.compute()
    assert probe.linear_error < 1e-6 and report.means.shape == (K, 12)
    assert report.accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert list(report.heads) == ["head", "head_dist"]
    for name, features in (("head", z), ("head_dist", z.relu())):
        linear = getattr(net, name)
        alone = nn.Sequential(nn.Identity(), linear).double().eval()
        with torch.no_grad(), NCProbe(alone, groups={"some": [0, 1, 2]}) as single:
            alone(features)
            single.update(labels)
        expected, got = single.compute().as_dict(), report.heads[name].as_dict()
        for key, value in expected.items():
            if isinstance(value, float):
                assert got[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key  # the other was computed in float32
        net.float()


def test_heads_named_by_the_caller():
    net = Net(bias=False)
    assert find_head(net, name="stem").maps[0].module is net.stem
    assert find_head(net).bias is None and find_head(net).weight.dtype == torch.float64
    with pytest.raises(
        ValueError, match=r"heads must have equally many classes, got \[\('stem', 6\), \('aside', 1\)\]"
    ):
        find_head(net, name=["stem", "aside"])
    with pytest.raises(ValueError, match="head must be the name of a module of Net, got 'steam'"):
        find_head(net, name=["stem", "steam"])


def test_no_linear_map():
    net = TimmNet()
    net.get_classifier = lambda: nn.Conv2d(3, 4, 3)
    for model, what in ((net, r"TimmNet.get_classifier\(\)"), (nn.Sequential(nn.Conv2d(3, 4, 3)), "Sequential")):
        with pytest.raises(ValueError, match=f"{what} must be or contain an nn.Linear or a 1x1 nn.Conv2d") as error:
            NCProbe(model)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "deit_tiny_distilled_patch16_224", "deq_resnet8_cifar"])
def test_features_of_a_model_without_classifier(name):
    model = timm.create_model(name, num_classes=0).eval()
    assert find_head(model) is None
    with pytest.raises(ValueError, match="num_classes must be given for a model without classifier"):
        NCProbe(model)
    x, labels = torch.randn(6, *model.pretrained_cfg["input_size"]), torch.arange(6) % 3
    with torch.no_grad(), NCProbe(model, num_classes=3) as probe:
        model(x)
        probe.update(labels)
        features = model(x).double()
    report = probe.compute()
    means = torch.stack([features[labels == k].mean(0) for k in range(3)])
    torch.testing.assert_close(report.means, means - means.mean(0), rtol=1e-5, atol=1e-6)
    absent = report.as_dict()
    for key in ("nc3", "nc3_cosine", "nc4", "accuracy", "nc2_etf_weight", "mean_accuracy"):
        assert absent[key] is None, key
    nearest = torch.cdist(features, means).argmin(1)
    assert report.nc1 > 0 and report.center_accuracy == float((nearest == labels).double().mean())


def test_one_head_of_two_is_not_enough():
    net = TimmNet()
    net.get_classifier = lambda: (net.fc, nn.Identity())
    with pytest.raises(ValueError, match="must be or contain an nn.Linear or a 1x1 nn.Conv2d, got Identity"):
        find_head(net)


def test_num_classes_of_a_classifier_is_its_own():
    with pytest.raises(ValueError, match="num_classes must be 7, got 8"):
        NCProbe(Net(), num_classes=8)
    assert NCProbe(Net(), num_classes=K).num_classes == K


def test_logits_that_are_not_linear_are_told():
    class Scaled(Net):
        def forward(self, x):
            return 3 * super().forward(x)

    x, labels = torch.randn(9, 5), torch.arange(9) % K
    net = Scaled().eval()
    with NCProbe(net) as probe, pytest.warns(UserWarning, match="of 'fc' is not what the model gives") as caught:
        for _ in range(2):
            net(x)
            probe.update(labels)
    assert len(caught) == 1 and probe.linear_error == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: {"features": 3 * logits, "logits": logits},
        lambda logits: (torch.tensor(1.0), logits),
        lambda logits: {"loss": torch.tensor(1.0), "out": logits, "aux": 2 * logits},
    ],
    ids=["dict", "tuple", "unnamed"],
)
def test_logits_in_dicts_and_tuples_are_compared(wrap):
    class Wrapped(Net):
        scale = 1

        def forward(self, x):
            return wrap(self.scale * super().forward(x))

    x, labels = torch.randn(9, 5), torch.arange(9) % K
    net = Wrapped().eval()
    with torch.no_grad(), NCProbe(net) as probe:
        net(x)
        probe.update(labels)
        assert probe.linear_error < 1e-6
        net.scale = 3
        probe.reset()
        net(x)
        with pytest.warns(UserWarning, match="of 'fc' is not what the model gives"):
            probe.update(labels)


def test_what_cannot_be_compared_is_told_once():
    class Loss(Net):
        def forward(self, x):
            return super().forward(x).logsumexp(1, keepdim=True), "text"

    x, labels = torch.randn(9, 5), torch.arange(9) % K
    net = Loss().eval()
    match = r"of 'fc' could not be compared with what the model gives, tensors of shapes \[\(9, 1\)\]"
    with torch.no_grad(), NCProbe(net) as probe, pytest.warns(UserWarning, match=match) as caught:
        for _ in range(2):
            net(x)
            probe.update(labels)
    assert len(caught) == 1 and probe.linear_error is None and probe.compute().accuracy >= 0


@pytest.mark.parametrize("kind", ["DeiT", "Levit"])
def test_distilled_transformers_are_measured_by_the_mean_of_both_heads(kind):
    import transformers  # takes seconds

    torch.manual_seed(0)
    if kind == "DeiT":
        size = {"image_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.DeiTConfig(num_labels=K, **size, patch_size=8, intermediate_size=16)
    else:
        sizes = {"hidden_sizes": [16, 16, 16], "num_attention_heads": [1, 1, 1], "depths": [1, 1, 1]}
        config = transformers.LevitConfig(num_labels=K, image_size=64, **sizes, key_dim=[8, 8, 8], mlp_ratio=[1, 1, 1])
    model = getattr(transformers, f"{kind}ForImageClassificationWithTeacher")(config).eval()
    x = torch.randn(4, 3, config.image_size, config.image_size)
    with torch.no_grad(), NCProbe(model) as probe:
        output = model(x)
        probe.update(torch.arange(4))
    assert len(probe.head.maps) == 2 and probe.linear_error < 1e-5
    accuracy = float((output.logits.argmax(1) == torch.arange(4)).double().mean())
    report = probe.compute()
    assert report.accuracy == accuracy and len(report.heads) == 2


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_32", "densenet121"])
def test_torchvision(name):
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=K).eval()
    x = torch.randn(2, 3, 224 if "vit" in name else 64, 224 if "vit" in name else 64)
    with torch.no_grad(), NCProbe(model) as probe:
        model(x)
        probe.update(torch.tensor([0, 1]))
    assert probe.linear_error < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT", "ResNet", "ConvNext", "Swin", "TimmWrapper", "DeiTWithTeacher"])
def test_transformers(name):
    import transformers

    small = {"num_labels": K, "image_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    match name:
        case "ViT":
            config = transformers.ViTConfig(**small, patch_size=8, intermediate_size=16)
        case "ResNet":
            config = transformers.ResNetConfig(num_labels=K, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        case "ConvNext":
            config = transformers.ConvNextConfig(num_labels=K, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])
        case "Swin":
            config = transformers.SwinConfig(
                num_labels=K, image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
            )
        case "TimmWrapper":
            config = transformers.TimmWrapperConfig(architecture="test_resnet", num_labels=K, do_pooling=True)
        case _:
            config = transformers.DeiTConfig(**small, patch_size=8, intermediate_size=16)
    kind = {"DeiTWithTeacher": "DeiTForImageClassificationWithTeacher"}.get(name, f"{name}ForImageClassification")
    model = getattr(transformers, kind)(config).eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad(), NCProbe(model) as probe:
        model(x)
        probe.update(torch.arange(4))
    assert probe.linear_error < 1e-5 and probe.compute().samples == 4
