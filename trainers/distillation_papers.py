"""The papers behind the losses of offline distillation, as cards cite them."""

from collections.abc import Mapping


def _paper(
    key: str, authors: str, title: str, arxiv_id: str, year: int, venue: str | None = None, short_title: str = ""
) -> Mapping[str, str]:
    """Title, arXiv id and BibTeX; a paper without a venue is cited as the preprint that it is."""
    kind, where = ("inproceedings", f"booktitle = {{{venue}}}") if venue else ("misc", f"eprint    = {{{arxiv_id}}}")
    citation = (
        f"@{kind}{{{key},\n"
        f"  title     = {{{short_title or title}}},\n"
        f"  author    = {{{authors}}},\n"
        f"  {where},\n"
        f"  year      = {{{year}}}\n"
        "}"
    )
    return {"title": title, "id": arxiv_id, "citation": citation}


_CVPR = "Conference on Computer Vision and Pattern Recognition"
_ICLR = "International Conference on Learning Representations"

PAPERS: Mapping[str, Mapping[str, str]] = {
    "kd": _paper(
        "hinton2015distilling",
        "Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff",
        "Distilling the Knowledge in a Neural Network",
        "1503.02531",
        2015,
    ),
    "dkd": _paper(
        "zhao2022decoupled",
        "Zhao, Borui and Cui, Quan and Song, Renjie and Qiu, Yiyu and Liang, Jiajun",
        "Decoupled Knowledge Distillation",
        "2203.08679",
        2022,
        _CVPR,
    ),
    "dist": _paper(
        "huang2022dist",
        "Huang, Tao and You, Shan and Wang, Fei and Qian, Chen and Xu, Chang",
        "Knowledge Distillation from A Stronger Teacher",
        "2205.10536",
        2022,
        "Advances in Neural Information Processing Systems",
    ),
    "logit_standardised": _paper(
        "sun2024logit",
        "Sun, Shangquan and Ren, Wenqi and Li, Jingzhi and Wang, Rui and Cao, Xiaochun",
        "Logit Standardization in Knowledge Distillation",
        "2403.01427",
        2024,
        _CVPR,
    ),
    "fitnets": _paper(
        "romero2015fitnets",
        "Romero, Adriana and Ballas, Nicolas and Kahou, Samira Ebrahimi and Chassang, Antoine and Gatta, Carlo and "
        "Bengio, Yoshua",
        "FitNets: Hints for Thin Deep Nets",
        "1412.6550",
        2015,
        _ICLR,
        "{FitNets}: Hints for Thin Deep Nets",
    ),
    "attention": _paper(
        "zagoruyko2017attention",
        "Zagoruyko, Sergey and Komodakis, Nikos",
        "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via Attention "
        "Transfer",
        "1612.03928",
        2017,
        _ICLR,
    ),
    "rkd": _paper(
        "park2019relational",
        "Park, Wonpyo and Kim, Dongju and Lu, Yan and Cho, Minsu",
        "Relational Knowledge Distillation",
        "1904.05068",
        2019,
        _CVPR,
    ),
    "crd": _paper(
        "tian2020contrastive",
        "Tian, Yonglong and Krishnan, Dilip and Isola, Phillip",
        "Contrastive Representation Distillation",
        "1910.10699",
        2020,
        _ICLR,
    ),
    "review": _paper(
        "chen2021reviewkd",
        "Chen, Pengguang and Liu, Shu and Zhao, Hengshuang and Jia, Jiaya",
        "Distilling Knowledge via Knowledge Review",
        "2104.09044",
        2021,
        _CVPR,
    ),
}
