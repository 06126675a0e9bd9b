"""CRIU's image messages, as far as ghostpool reads them, on the protobuf runtime.

The table below holds only the fields that are needed; the runtime skips all others, so images
of newer CRIU versions parse as well. Strings are declared as bytes and enums as int32: the wire
format is the same, and neither file names that are not UTF-8 nor enum values of a later CRIU
are lost. Field numbers and labels are those of CRIU 4.2 (images/*.proto); nothing is generated,
the descriptor is built at import in a pool of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from ghostpool._errors import ImageError
from ghostpool._limits import Limits, beyond

# "<number> <r required, o optional, * repeated> <type> <name>", comma-separated; some with what
# they are if they are not there. Sub-messages that nothing reads stay undeclared, even where CRIU
# itself requires them (reg: fown).
_MESSAGES: Final = {
    "task_kobj_ids_entry": """
        1 r uint32 vm_id, 2 r uint32 files_id, 3 r uint32 fs_id, 4 r uint32 sighand_id,
        9 o uint32 mnt_ns_id, 10 o uint32 user_ns_id""",
    "inventory_entry": """
        1 r uint32 img_version, 2 o bool fdinfo_per_id, 3 o task_kobj_ids_entry root_ids,
        4 o bool ns_per_id""",
    "pstree_entry": """
        1 r uint32 pid, 2 r uint32 ppid, 3 r uint32 pgid, 4 r uint32 sid, 5 * uint32 threads""",
    "task_core_entry": "1 r uint32 task_state",
    "core_entry": "1 r int32 mtype, 3 o task_core_entry tc",
    "fs_entry": "1 r uint32 cwd_id, 2 r uint32 root_id",
    "vma_entry": """
        1 r uint64 start, 2 r uint64 end, 4 r uint64 shmid, 5 r uint32 prot, 6 r uint32 flags,
        7 r uint32 status, 10 o uint32 fdflags""",
    "mm_entry": "12 r uint32 exe_file_id, 14 * vma_entry vmas",
    "fdinfo_entry": "1 r uint32 id, 2 r uint32 flags, 3 r int32 type, 4 r uint32 fd",
    "reg_file_entry": """
        1 r uint32 id, 2 r uint32 flags, 3 r uint64 pos, 6 r bytes name, 7 o sint32 mnt_id -1,
        8 o uint64 size, 9 o bool ext, 10 o uint32 mode""",
    "sk_opts_entry": """
        1 r uint32 so_sndbuf, 2 r uint32 so_rcvbuf, 3 r uint64 so_snd_tmo_sec,
        4 r uint64 so_snd_tmo_usec, 5 r uint64 so_rcv_tmo_sec, 6 r uint64 so_rcv_tmo_usec,
        11 o bool so_passcred, 12 o bool so_passsec""",
    "file_perms_entry": "1 r uint32 mode, 2 r uint32 uid, 3 r uint32 gid",
    "unix_sk_entry": """
        1 r uint32 id, 3 r uint32 type, 4 r uint32 state, 5 r uint32 flags, 6 r uint32 uflags,
        7 r uint32 backlog, 8 r uint32 peer, 10 r sk_opts_entry opts, 11 r bytes name,
        12 o int32 shutdown, 13 o file_perms_entry file_perms, 14 o bytes name_dir,
        15 o bool deleted""",
    "fifo_entry": "1 r uint32 id, 2 r uint32 pipe_id, 3 o uint32 regf_id",
    "tty_file_entry": "1 r uint32 id, 6 o uint32 regf_id",
    "any_file_entry": "1 r uint32 id",
    "file_entry": """
        1 r int32 type, 2 r uint32 id, 3 o reg_file_entry reg, 16 o unix_sk_entry usk,
        17 o fifo_entry fifo, 19 o tty_file_entry tty""",
    "pipe_data_entry": "1 r uint32 pipe_id, 2 r uint32 bytes, 3 o uint32 size",
    "remap_file_path_entry": "1 r uint32 orig_id, 2 r uint32 remap_id, 3 o int32 remap_type",
    "timeval": "1 r uint64 tv_sec, 2 r uint64 tv_usec",
    "ghost_file_entry": """
        1 r uint32 uid, 2 r uint32 gid, 3 r uint32 mode, 6 o uint32 rdev, 7 o timeval atim,
        8 o timeval mtim, 9 o bool chunks, 10 o uint64 size, 11 o bytes symlnk_target""",
    "ghost_chunk_entry": "1 r uint64 len, 2 r uint64 off",
    "mnt_entry": """
        1 r uint32 fstype, 2 r uint32 mnt_id, 3 r uint32 root_dev, 4 r uint32 parent_mnt_id,
        5 r uint32 flags, 6 r bytes root, 7 r bytes mountpoint, 8 r bytes source,
        9 r bytes options, 10 o uint32 shared_id, 11 o uint32 master_id, 13 o bool ext_mount,
        14 o bytes fsname, 16 o bool deleted, 17 o uint32 sb_flags, 18 o bytes ext_key""",
}

_PACKAGE: Final = "ghostpool.criu"
_REQUIRED: Final = {
    name: frozenset(field.split()[3] for field in fields.split(",") if field.split()[1] == "r")
    for name, fields in _MESSAGES.items()
}
_REPEATED: Final = frozenset(("vmas",))
"""Repeated fields that hold messages."""


def _file() -> descriptor_pb2.FileDescriptorProto:
    field_type = descriptor_pb2.FieldDescriptorProto
    labels = {
        "r": field_type.LABEL_REQUIRED,
        "o": field_type.LABEL_OPTIONAL,
        "*": field_type.LABEL_REPEATED,
    }
    types = {
        "uint32": field_type.TYPE_UINT32,
        "uint64": field_type.TYPE_UINT64,
        "int32": field_type.TYPE_INT32,
        "sint32": field_type.TYPE_SINT32,
        "bool": field_type.TYPE_BOOL,
        "bytes": field_type.TYPE_BYTES,
    }
    file = descriptor_pb2.FileDescriptorProto(
        name="ghostpool/criu.proto", package=_PACKAGE, syntax="proto2"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields.split(","):
            number, label, kind, field_name, *default = field.split()
            added = message.field.add(name=field_name, number=int(number), label=labels[label])
            if default:
                added.default_value = default[0]
            if kind in types:
                added.type = types[kind]
            else:
                added.type = field_type.TYPE_MESSAGE
                added.type_name = f".{_PACKAGE}.{kind}"
    return file


_pool = descriptor_pool.DescriptorPool()
_pool.AddSerializedFile(_file().SerializeToString())


def message_class(name: str) -> Any:
    """The class of CRIU's message `name`. KeyError: not a message that ghostpool reads."""
    return _CLASSES[name]


_CLASSES: Final[dict[str, Any]] = {
    name: message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
    for name in _MESSAGES
}


_MM: Final = _CLASSES["mm_entry"]
_MAPPINGS: Final = Limits().mappings


def decode(kind: Any, data: bytes, file: str, record: int) -> Any:
    """Parse one record; ImageError for malformed bytes and for a missing required field.

    `kind` is a class of `message_class`; `file` and `record` only name the place in an error.
    """
    if kind is _MM and (most := data.count(b"\x72") + data.count(b"\xf2")) > _MAPPINGS:
        # Each mapping has a byte of its own with this tag, 14 and length-delimited (or with its
        # continuation bit, in a longer spelling): a bound, before two bytes become fifty.
        what = f"up to {most:,} mappings"
        raise beyond(file, record, what, f"{_MAPPINGS:,}", "dump a task with fewer of them")
    message = attempt(kind, data)
    if message is not None:
        return message
    try:
        message = kind.FromString(data)
    except DecodeError:
        raise ImageError(
            file, record, f"the {len(data)} bytes are not a {kind.DESCRIPTOR.name}"
        ) from None
    raise ImageError(file, record, f"{kind.DESCRIPTOR.name} lacks {_missing(message)}")


def attempt(kind: Any, data: bytes) -> Any:
    """The message; None for what `decode` raises an error for."""
    try:
        message = kind.FromString(data)
    except DecodeError:
        return None
    # The runtime (upb) parses a message without its required fields without a murmur; CRIU
    # refuses it, and every reader after us would see zeros.
    return message if message.IsInitialized() else None


def decode_all(kind: Any, pieces: list[bytes], file: str, first: int) -> Iterable[Any]:
    """Parse records, the first of which is number `first`; as `decode` does, but at once."""
    try:
        messages = [] if kind is _MM else list(map(kind.FromString, pieces))
    except DecodeError:
        messages = []
    if messages and all(map(kind.IsInitialized, messages)):
        return messages
    return (decode(kind, data, file, number) for number, data in enumerate(pieces, first))


def _missing(message: Any) -> str:
    """The first required field that is not there; the runtime would list them all."""
    for field in message.DESCRIPTOR.fields:
        if field.name in _REQUIRED[message.DESCRIPTOR.name] and not message.HasField(field.name):
            return str(field.name)
        if field.message_type is not None:
            repeated = field.name in _REPEATED
            value = getattr(message, field.name)
            for inner in value if repeated else [value] * message.HasField(field.name):
                if not inner.IsInitialized():
                    return f"{field.name}.{_missing(inner)}"
    raise AssertionError(message.DESCRIPTOR.name)


__all__ = ["attempt", "decode", "decode_all", "message_class"]
