"""A filter (seccomp) of the system calls that lead out of a box, or to memory that no limit counts.

Namespaces leave some doors: a namespace of users inside has all privileges again, with file systems
in memory of any size; sockets to the host of a virtual machine (AF_VSOCK) know no namespaces;
System V memory and memfds outlive the address space that filled them. The filter refuses these
calls with EPERM, and sockets other than AF_UNIX. It knows two machines; on others there is no box.
"""

import ctypes
import errno
import os
import struct

from dsv3_jax.posttrain.sandbox.linux import call

# Name -> number on x86-64 and on AArch64; None: no such call there.
_REFUSED: dict[str, tuple[int, int | None]] = {
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    # memory that is no process's own
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # keys, and large parts of the kernel that a program of this kind has no use for
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "uselib": (134, None),
    # the machine
    "acct": (163, 89),
    "swapon": (167, 224),
    "reboot": (169, 142),
    "syslog": (103, 116),
    "quotactl": (179, 60),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
}
_CLONE, _SOCKET, _SOCKETPAIR = (56, 220), (41, 198), (53, 199)
_CLONE3 = 435
_NEW_NAMESPACES = 0x7E020000  # the CLONE_NEW* of clone; that of time is unknown to it
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_*
_X32 = 0x40000000  # x86-64's second numbering of the same calls

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16  # offsets; the low half of 64 bits
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_AF_UNIX = 1
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2


def knows(machine: str) -> bool:
    """Whether there is a filter for it."""
    return machine in _MACHINES


def program(machine: str) -> bytes:
    """The filter, 8 bytes an instruction."""
    column, architecture = _MACHINES[machine]
    refuse = _instruction(_RETURN, _ERROR | errno.EPERM)
    allow = _instruction(_RETURN, _ALLOW)
    lines = [
        _instruction(_LOAD, _MACHINE),
        _instruction(_EQUAL, architecture, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
        _instruction(_AT_LEAST, _X32, 0, 1),
        refuse,
        _instruction(_EQUAL, _CLONE3, 0, 1),
        _instruction(_RETURN, _ERROR | errno.ENOSYS),  # C libraries then call clone
    ]
    for numbers in _REFUSED.values():
        if numbers[column] is not None:
            lines += [_instruction(_EQUAL, numbers[column], 0, 1), refuse]
    first = _instruction(_LOAD, _FIRST_ARGUMENT)
    named = _instruction(_ANY_BIT, _NEW_NAMESPACES, 0, 1)
    lines += [_instruction(_EQUAL, _CLONE[column], 0, 4), first, named, refuse, allow]
    for call_of_sockets in (_SOCKET, _SOCKETPAIR):
        local = _instruction(_EQUAL, _AF_UNIX, 1, 0)
        lines += [_instruction(_EQUAL, call_of_sockets[column], 0, 4), first, local, refuse, allow]
    return b"".join([*lines, allow])


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def install() -> None:
    """For this process and its children, for good. It must have given up new privileges before."""
    code = ctypes.create_string_buffer(program(os.uname().machine))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    whole = Program((len(code) - 1) // 8, ctypes.addressof(code))
    zero = ctypes.c_ulong(0)
    mode = ctypes.c_ulong(_SECCOMP_MODE_FILTER)
    call("prctl", ctypes.c_int(_PR_SET_SECCOMP), mode, ctypes.byref(whole), zero, zero)
