"""What a Parquet file takes in memory once it is read, by its footer and the headers of its pages, before it is read.

A page says itself how large it is once decompressed, and readers allocate as much and fill it: some kilobytes can
become gigabytes. Headers are structs in Thrift's compact protocol (parquet.thrift's PageHeader and the compact
protocol's specification, both of the Apache projects); nothing is decompressed here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow.parquet as pq

# What any row group may take, and how many times its size in the file: text is seldom stored in a fiftieth of its size.
FLOOR, TIMES = 1 << 28, 256
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12, "BYTE_ARRAY": 4}
_HEADERS = (1 << 12, 1 << 24)  # bytes to look for a header in: most are short, statistics can make them long
_DEEPEST = 8
_SIZE, _STORED = 2, 3  # fields of a PageHeader
_DATA_HEADERS = (5, 8)  # those of a data page, of either version; its first field is how many values there are


class Chunk(NamedTuple):
    """The pages of one column in one row group.

    Attributes:
        name: of the column, the path of it in the schema.
        type: the physical type.
        pages: how many.
        values: how many, those that are null included.
        size: bytes of the pages once decompressed.
        width: bytes of a value, or of what says where it ends, once read.
        stored: bytes in the file, without headers.
    """

    name: str
    type: str
    pages: int
    values: int
    size: int
    width: int
    stored: int

    @property
    def memory(self) -> int:
        """Bytes in memory: few values on a page can stand for many, and many bytes for few values."""
        return max(self.size, self.values * self.width)


def groups(file: BinaryIO, metadata: pq.FileMetaData) -> Iterator[list[Chunk]]:
    """The columns of each row group. ValueError, naming the column, for pages that are not what the footer says."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        yield [_chunk(file, group.column(i), metadata.schema.column(i).length) for i in range(group.num_columns)]


def check_memory(chunks: list[Chunk]) -> None:
    """ValueError for chunks that would take more memory than what is stored of them makes likely."""
    memory, stored = sum(chunk.memory for chunk in chunks), sum(chunk.stored for chunk in chunks)
    if memory > FLOOR + TIMES * stored:
        raise ValueError(f"it has {memory} bytes in {stored}: more than {TIMES} to one, as no data has")


def _chunk(file: BinaryIO, column: pq.ColumnChunkMetaData, length: int) -> Chunk:
    name, values = column.path_in_schema, column.num_values
    at, end = column.data_page_offset, file.seek(0, os.SEEK_END)
    if column.dictionary_page_offset:
        at = min(at, column.dictionary_page_offset)
    pages = seen = size = stored = 0
    try:
        # as readers do, not by the chunk's length: some writers leave out the dictionary's page
        while seen < values:
            header, begin = _header(file, at, end)
            if not {_SIZE, _STORED} <= header.keys():
                raise ValueError("a header without sizes")
            at = begin + header[_STORED]
            if at > end or min(header[_SIZE], header[_STORED]) < 0:
                raise ValueError(f"a page of {header[_STORED]} bytes, {header[_SIZE]} without compression")
            more = next((header[key][1] for key in _DATA_HEADERS if key in header), 0)
            if not 0 <= more <= values - seen:
                raise ValueError(f"a page of {more} values, where there are {values}")
            pages, seen, size, stored = pages + 1, seen + more, size + header[_SIZE], stored + header[_STORED]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"column {name!r} has a page that is damaged ({type(error).__name__}: {error})") from error
    width = _WIDTHS.get(column.physical_type, length or 0)
    return Chunk(name, column.physical_type, pages, values, size, width, stored)


def _header(file: BinaryIO, at: int, end: int) -> tuple[dict[int, Any], int]:
    """The fields of the header at a place, by number, and where it ends."""
    for most in _HEADERS:
        file.seek(at)
        data = file.read(min(most, max(0, end - at)))
        try:
            fields, length = _struct(data, 0, _DEEPEST)
            return fields, at + length
        except IndexError:
            continue
    raise ValueError("its header is cut off")


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """A struct's integers and structs by the number of the field; IndexError where the data end before it."""
    if not depth:
        raise ValueError("structs nested too deep")
    fields, number = {}, 0
    while data[at]:
        step, kind, at = data[at] >> 4, data[at] & 15, at + 1
        if step:
            number += step
        else:
            number, at = _integer(data, at)
        if kind in (1, 2):  # true and false: the kind is the value
            continue
        if kind == 3:  # a byte
            at += 1
        elif kind in (4, 5, 6):
            fields[number], at = _integer(data, at)
        elif kind == 8:  # bytes, as statistics have
            length, at = _varint(data, at)
            at += length
        elif kind == 12:
            fields[number], at = _struct(data, at, depth - 1)
        else:
            raise ValueError(f"a field of type {kind}")
    return fields, at + 1


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("an integer of more than 64 bits")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
