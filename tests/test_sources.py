"""Importers of public formats, each on a tiny hand-made download."""

from __future__ import annotations

import csv
import gzip
import json
import tarfile
from pathlib import Path

import pytest
import yaml

from rayrec.data.sources import SOURCES, import_source
from rayrec.errors import DataError, UsageError

FILES = {
    "online_retail": {
        "2010-12-01.csv": "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
        '536365,85123A,"HEART, white",6,2010-12-01 08:26:00,2.55,17850.0,United Kingdom\n'
        "C536379,85123A,heart,-1,12/1/2010 8:30,0.0,,France\n",
        "2010-12-02.csv": "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
        'A1,85123A,"HEART, white",1,2010-12-02 08:26:00,-9,17850.0,France\n',
    },
    "taobao_userbehavior": {
        "UserBehavior.csv": "1,2268318,2520377,pv,1511544070\n1,2333346,2520771,buy,1511561733\n1,2",
    },
    "movielens_1m": {
        "ratings.dat": "1::1193::5::978300760\n2::1::3::978302109\n",
        "movies.dat": "1::Toy Story (1995)::Animation|Children's\n1193::Am\xe9lie (2001)::Drama\n",
    },
    "hm": {
        "transactions_train.csv": "t_dat,customer_id,article_id,price,sales_channel_id\n"
        "2018-09-20,00ab,0663713001,0.05,2\n",
        "articles.csv": "article_id,prod_name,product_type_name,product_group_name,index_group_name\n"
        "0663713001,Strap top,Vest top,Garment Upper body,Ladieswear\n",
        "images/066/0663713001.jpg": "jpg",
    },
    "retailrocket": {
        "events.csv": "timestamp,visitorid,event,itemid,transactionid\n1433221332117,257597,addtocart,355908,\n",
        "item_properties_part1.csv": "timestamp,itemid,property,value\n1435460400000,355908,categoryid,1338\n"
        "1435460500000,355908,888,1116713\n",
        "item_properties_part2.csv": "timestamp,itemid,property,value\n1435460300000,355908,categoryid,1\n",
    },
    "amazon_reviews": {
        "reviews_Beauty.json": '{"reviewerID": "A1", "asin": "0001", "overall": 5.0, "unixReviewTime": 1369699200}',
        "Beauty_2023.jsonl": json.dumps(
            {"user_id": "A2", "asin": "x", "parent_asin": "B2", "rating": 3, "timestamp": 1588687728923}
        ),
        "meta_Beauty.json": json.dumps(
            {"asin": "0001", "title": "Soap", "brand": "Fa", "price": "$3.50", "categories": [["Beauty", "Bath"]]}
        ),
    },
    "recbole": {
        "ml.inter": 'user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n186\t"302\n',
        "ml.item": "item_id:token\tmovie_title:token_seq\tclass:token_seq\n242\tToy Story\tAnimation Comedy\n302\t\n",
    },
    "s3rec": {
        "Toys.txt": "1 7 8\n2 8\n\n",
        "Toys_sample.txt": "1 9 9\n",
        "Toys_item2attributes.json": '{"7": [3, 1], "8": []}',
    },
}

EXPECTED = {
    "online_retail": [
        ("17850.0", "536365", "85123A", "2010-12-01 08:26:00", "purchase", "2.55", "6"),
        ("", "C536379", "85123A", "2010-12-01 08:30:00", "cancel", "0.0", "-1"),
        ("17850.0", "A1", "85123A", "2010-12-02 08:26:00", "adjust", "-9", "1"),
    ],
    "taobao_userbehavior": [("1", "2268318", "1511544070", "pv"), ("1", "2333346", "1511561733", "buy"), ("1", "2")],
    "movielens_1m": [("1", "1193", "978300760", "rate", "5"), ("2", "1", "978302109", "rate", "3")],
    "hm": [("00ab", "0663713001", "2018-09-20", "purchase", "0.05")],
    "retailrocket": [("257597", "355908", "1433221332117", "addtocart")],
    "amazon_reviews": [("A2", "B2", "1588687728923", "rate", "3"), ("A1", "0001", "1369699200", "rate", "5.0")],
    "recbole": [("196", "242", "881250949", "rate", "3"), ("186", '"302', "", "rate", "")],
    "s3rec": [("1", "7", "0", "view"), ("1", "8", "1", "view"), ("2", "8", "0", "view")],
}

ITEMS = {
    "online_retail": [("85123A", "", "", "2.55", "HEART, white", "")],
    "taobao_userbehavior": [("2268318", "2520377", "", "", "", ""), ("2333346", "2520771", "", "", "", "")],
    "movielens_1m": [
        ("1", "Animation|Children's", "", "", "Toy Story (1995)", ""),
        ("1193", "Drama", "", "", "Amélie (2001)", ""),
    ],
    "retailrocket": [("355908", "1338", "", "", "", "")],
    "amazon_reviews": [("0001", "Beauty|Bath", "Fa", "3.50", "Soap", "")],
    "recbole": [("242", "Animation|Comedy", "", "", "Toy Story", ""), ("302", "", "", "", "", "")],
    "s3rec": [("7", "3|1", "", "", "", ""), ("8", "", "", "", "", "")],
}


def download(folder: Path, name: str) -> Path:
    for file, text in FILES[name].items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text, encoding="latin-1" if file.endswith(".dat") else "utf-8")
    return folder


def read(path: Path) -> list[tuple[str, ...]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return [tuple(row) for row in csv.reader(stream)][1:]


@pytest.mark.parametrize("name", SOURCES)
def test_every_format(tmp_path: Path, name: str) -> None:
    counts = import_source(name, download(tmp_path / "src", name), tmp_path / "raw")
    events = [row for path in sorted((tmp_path / "raw" / "events").glob("*.csv")) for row in read(path)]
    assert events == EXPECTED[name]
    assert counts["events"] == len(events)
    if name in ITEMS:
        assert read(tmp_path / "raw" / "items.csv") == ITEMS[name]


def test_hm_images_are_referred_to_not_copied(tmp_path: Path) -> None:
    import_source("hm", download(tmp_path / "src", "hm"), tmp_path / "raw")
    (item,) = read(tmp_path / "raw" / "items.csv")
    assert item[-1] == str(tmp_path / "src" / "images/066/0663713001.jpg")
    assert item[1:3] == ("Garment Upper body/Vest top", "Ladieswear")


def test_taobao_brings_its_window_along(tmp_path: Path) -> None:
    import_source("taobao_userbehavior", download(tmp_path / "src", "taobao_userbehavior"), tmp_path / "raw")
    settings = yaml.safe_load((tmp_path / "raw" / "prepare.yaml").read_text())
    assert settings["clean.after"] == "2017-11-25T00:00:00+08:00"


def test_archives_and_compressed_files(tmp_path: Path) -> None:
    src = download(tmp_path / "src", "online_retail")
    with tarfile.open(tmp_path / "days.tar.gz", "w:gz") as archive:
        archive.add(src, "by-day")
    import_source("online_retail", tmp_path / "days.tar.gz", tmp_path / "raw")
    assert [path.name for path in sorted((tmp_path / "raw/events").iterdir())] == [
        "2010-12-01-00000.csv", "2010-12-02-00000.csv",
    ]  # fmt: skip
    reviews = tmp_path / "reviews.json.gz"
    reviews.write_bytes(gzip.compress(FILES["amazon_reviews"]["reviews_Beauty.json"].encode()))
    assert import_source("amazon_reviews", reviews, tmp_path / "raw2") == {"events": 1, "items": 0}


def test_a_folder_may_hold_archives_and_files_of_other_kinds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = download(tmp_path / "src", "online_retail")
    folder = tmp_path / "folder"
    for name in ("first", "second"):
        (folder / name).mkdir(parents=True)
        with tarfile.open(folder / name / "days.tar.gz", "w:gz") as archive:
            archive.add(src, "by-day")
    (folder / "items.csv").write_text("item_id,title\n1,Heart\n")
    counts = import_source("online_retail", folder, tmp_path / "raw")
    assert counts["events"] == 2 * len(EXPECTED["online_retail"]), "files of one name do not overwrite each other"
    assert "passed over" in capsys.readouterr().err

    (folder / "first").rename(tmp_path / "away")
    (folder / "second").rename(tmp_path / "away2")
    with pytest.raises(DataError, match="no column InvoiceNo"):
        import_source("online_retail", folder, tmp_path / "raw2")


def test_a_day_whose_header_has_changed_is_an_error(tmp_path: Path) -> None:
    src = download(tmp_path / "src", "online_retail")
    day = sorted(src.rglob("*.csv"))[-1]
    day.write_text(day.read_text().replace("CustomerID", "Customer ID", 1))
    with pytest.raises(DataError, match=f"{day.name}: no column CustomerID; it has: "):
        import_source("online_retail", src, tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_shards_have_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrec.data.sources.SHARD_ROWS", 1)
    import_source("movielens_1m", download(tmp_path / "src", "movielens_1m"), tmp_path / "raw")
    shards = sorted((tmp_path / "raw" / "events").iterdir())
    assert [read(path) for path in shards] == [[row] for row in EXPECTED["movielens_1m"]]


def test_a_damaged_archive_is_the_sources_fault(tmp_path: Path) -> None:
    src = download(tmp_path / "src", "online_retail")
    with tarfile.open(tmp_path / "days.tar.gz", "w:gz") as archive:
        archive.add(src, "by-day")
    whole = (tmp_path / "days.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[:-40])
    (tmp_path / "text.csv.gz").write_text("InvoiceNo,StockCode")
    for name in ("cut.tar.gz", "text.csv.gz"):
        with pytest.raises(DataError, match=f"{name}: a damaged archive"):
            import_source("online_retail", tmp_path / name, tmp_path / "raw")
        assert not (tmp_path / "raw").exists()


def test_atomic_files_without_ratings_are_views_and_without_times_are_refused(tmp_path: Path) -> None:
    (tmp_path / "seen.inter").write_text("item_id:token\ttimestamp:float\tuser_id:token\n5\t17\tu\n")
    import_source("recbole", tmp_path / "seen.inter", tmp_path / "raw")
    assert read(tmp_path / "raw/events/part-00000.csv") == [("u", "5", "17", "view", "")]
    (tmp_path / "seen.inter").write_text("user_id:token\titem_id:token\nu\t5\n")
    with pytest.raises(DataError, match=r"seen\.inter: no column timestamp; it has: user_id, item_id"):
        import_source("recbole", tmp_path / "seen.inter", tmp_path / "raw2")
    (tmp_path / "seen.inter").write_text("user_id,item_id\nu,5\n")
    with pytest.raises(DataError, match="must name columns and their types"):
        import_source("recbole", tmp_path / "seen.inter", tmp_path / "raw2")


def test_which_of_several_sets_is_meant_must_be_said(tmp_path: Path) -> None:
    src = download(tmp_path / "src", "s3rec")
    (src / "Beauty.txt").write_text("1 5\n")
    with pytest.raises(DataError, match=r"holds Beauty\.txt, Toys\.txt; name one"):
        import_source("s3rec", src, tmp_path / "raw")
    assert import_source("s3rec", src / "Beauty.txt", tmp_path / "raw") == {"events": 1, "items": 0}
    (src / "Beauty.txt").unlink()
    (src / "Toys.txt").unlink()
    with pytest.raises(DataError, match=r"no \*\.txt; there is: Toys_item2attributes\.json, Toys_sample\.txt"):
        import_source("s3rec", src, tmp_path / "raw2")


@pytest.mark.parametrize("damaged", ["[7", "[7]", "null", '{"7": 3}', '{"7": "ab"}'])
def test_damaged_attributes_are_told(tmp_path: Path, damaged: str) -> None:
    src = download(tmp_path / "src", "s3rec")
    (src / "Toys_item2attributes.json").write_text(damaged)
    with pytest.raises(DataError, match="not a JSON object of items"):
        import_source("s3rec", src / "Toys.txt", tmp_path / "raw")


def test_a_sequence_goes_on_in_a_later_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeff1 5\n2 5\n1 6\n", encoding="utf-8")
    import_source("s3rec", tmp_path / "a.txt", tmp_path / "raw")
    rows = read(tmp_path / "raw/events/part-00000.csv")
    assert rows == [("1", "5", "0", "view"), ("2", "5", "0", "view"), ("1", "6", "1", "view")]


@pytest.mark.parametrize(
    ("cell", "category"),
    [("Drama War", "Drama|War"), ("'Hair Care', 'Beauty'", "Hair Care|Beauty"), ("Action, Sci Fi", "Action|Sci Fi"),
     ("'Hair Care'", "Hair Care"), ("", "")],
)  # fmt: skip
def test_categories_of_atomic_files_by_commas_or_by_spaces(tmp_path: Path, cell: str, category: str) -> None:
    (tmp_path / "a.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\t5\t1\n\n")
    (tmp_path / "a.item").write_text(f'item_id:token\ttitle:token\tgenre:token_seq\n5\t"7"" comb"\t{cell}\n')
    assert import_source("recbole", tmp_path, tmp_path / "out") == {"events": 1, "items": 1}
    assert read(tmp_path / "out/items.csv") == [("5", category, "", "", '7" comb', "")]


@pytest.mark.parametrize(
    ("header", "row", "told"),
    [
        ("user_id:token\tx:token\tx:token\titem_id:token", "u\t1\t2\t5", "two columns of one name"),
        ("user_id:token\titem_id:token\ttimestamp:float", "u" * 200_000 + "\t5\t1", "cannot be read as a table"),
    ],
)
def test_atomic_files_that_cannot_be_read(tmp_path: Path, header: str, row: str, told: str) -> None:
    (tmp_path / "a.inter").write_text(f"{header}\n{row}\n")
    with pytest.raises(DataError, match=told):
        import_source("recbole", tmp_path, tmp_path / "out")


def test_columns_that_are_passed_over_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.inter").write_text(
        "user_id:token\titem_id:token\ttimestamp:float\tbehavior_type:token\nu\t5\t1\tbuy\n"
    )
    import_source("recbole", tmp_path, tmp_path / "out")
    assert "passed over the columns behavior_type" in capsys.readouterr().err


def test_mistakes_are_explained(tmp_path: Path) -> None:
    src = download(tmp_path / "src", "hm")
    with pytest.raises(UsageError, match="unknown format 'netflix': choose one of online_retail"):
        import_source("netflix", src, tmp_path / "raw")
    with pytest.raises(UsageError, match="no such file"):
        import_source("hm", tmp_path / "none", tmp_path / "raw")
    with pytest.raises(UsageError, match="not an empty folder"):
        import_source("hm", src, src)
    with pytest.raises(DataError, match=r"no ratings\.dat; there is: articles\.csv"):
        import_source("movielens_1m", src, tmp_path / "raw")
    with pytest.raises(DataError, match="no column visitorid, itemid"):
        import_source("retailrocket", src / "articles.csv", tmp_path / "raw3")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found no events"):
        import_source("online_retail", tmp_path / "empty", tmp_path / "raw4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "src"]
