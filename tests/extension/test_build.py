"""The build: what it falls back to, and what it writes down."""

import json
import subprocess

import pytest

from tests.extension.fakes import COMPILER, fake_torch, nvcc, script


def read_record(package):
    return json.loads((package / "_extension.json").read_text())


@pytest.mark.parametrize("variable", ["EMBEDKERNELS_BUILD_EXTENSION", "CXX"])
def test_a_build_that_cannot_be_leaves_a_reason_and_no_old_library(tools, monkeypatch, tmp_path, capfd, variable):
    builder, _ = tools
    package = tmp_path / "package"
    package.mkdir()
    (package / "_extension.so").write_bytes(b"from an earlier build")
    monkeypatch.setenv(variable, "0" if variable.startswith("EMBED") else "no-such-compiler")
    builder.build(tmp_path / "build", package)
    assert not (package / "_extension.so").exists()
    record = read_record(package)
    assert record["built"] is False
    assert ("no-such-compiler on PATH" if variable == "CXX" else "EMBEDKERNELS_BUILD_EXTENSION was 0") in record[
        "reason"
    ]
    assert f"WITHOUT its C++ library: {record['reason']}" in capfd.readouterr().err


def test_a_compiler_that_fails(tools, monkeypatch, tmp_path, capfd):
    builder, toolchain = tools
    monkeypatch.setenv("EMBEDKERNELS_CUDA", "0")
    monkeypatch.setenv("CXX", script(tmp_path / "broken", "echo 'x.cpp:3: error: my message' >&2; exit 1"))
    record = builder.build(tmp_path / "build", tmp_path / "package")
    assert not record.built
    assert read_record(tmp_path / "package")["reason"] == "it did not compile: x.cpp:3: error: my message"
    printed = capfd.readouterr()
    assert "my message" in printed.out
    assert "WITHOUT its C++ library" in printed.err
    monkeypatch.setenv("EMBEDKERNELS_REQUIRE_EXTENSION", "1")
    with pytest.raises(toolchain.Missing, match="it did not compile"):
        builder.build(tmp_path / "build", tmp_path / "package")


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A C++ compiler that compiles anything; returns where it notes its arguments."""
    log = tmp_path / "arguments"
    monkeypatch.setenv("CXX", script(tmp_path / "c++", COMPILER.format(log=log)))
    return log


def test_cuda_code_that_does_not_compile_leaves_a_library_for_the_cpu(
    tools, monkeypatch, tmp_path, cuda_home, capfd, compiler
):
    """A C++ compiler too new for this nvcc is common: it still makes the library for the CPU."""
    builder, _ = tools
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    monkeypatch.setenv("EMBEDKERNELS_REQUIRE_EXTENSION", "1")
    record = builder.build(tmp_path / "build", tmp_path / "package")
    assert record.built
    assert record.architectures == []
    error = "host_config.h:3:2: error: #error -- unsupported GNU version! gcc later than 12"
    assert record.reason == f"CPU only: the CUDA code did not compile: {error}"
    assert read_record(tmp_path / "package")["reason"] == record.reason
    assert (tmp_path / "package/_extension.so").is_file()
    assert f"WITHOUT its CUDA code: it did not compile: {error}" in capfd.readouterr().err
    # The next build tries again.
    nvcc(cuda_home, compile=COMPILER.format(log=tmp_path / "nvcc-arguments"))
    record = builder.build(tmp_path / "build", tmp_path / "package")
    assert record.reason == "C++ and CUDA 13.0"
    assert record.architectures == ["sm_80", "sm_90", "sm_120", "compute_120"]


def test_neither_cuda_nor_cpp_compiles(tools, monkeypatch, tmp_path, cuda_home):
    builder, _ = tools
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    monkeypatch.setenv("CXX", script(tmp_path / "broken", "echo 'x.cpp:3: error: my message' >&2; exit 1"))
    record = builder.build(tmp_path / "build", tmp_path / "package")
    assert (record.built, record.reason) == (False, "it did not compile: x.cpp:3: error: my message")


@pytest.mark.parametrize("form", ["FAILED: {}", "FAILED: [code=1] {}"])
def test_cpp_that_does_not_compile_is_not_blamed_on_cuda(
    tools, monkeypatch, tmp_path, cuda_home, capfd, compiler, form
):
    """Without CUDA it would not compile either: it is not tried again. Ninja has named what failed in two ways."""
    builder, _ = tools
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    log = tmp_path / "runs"
    nvcc(cuda_home, compile=COMPILER.format(log=tmp_path / "nvcc-arguments"))
    said = f"echo '{form.format('cpu/plan.cpp.o')}'; echo 'plan.cpp:3: error: my message'; exit 1"
    ninja = script(tmp_path / "ninja", f"echo run >> {log}; {said}")
    monkeypatch.setattr(builder, "find_ninja", lambda: ninja)
    record = builder.build(tmp_path / "build", tmp_path / "package")
    assert (record.built, record.reason) == (False, "it did not compile: plan.cpp:3: error: my message")
    assert log.read_text() == "run\n"
    assert "CUDA" not in capfd.readouterr().err


def test_ninja_names_the_cpp_that_failed(tools, monkeypatch, tmp_path, cuda_home, capfd):
    """As above with the ninja there is, after the CUDA code has compiled."""
    builder, _ = tools
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    monkeypatch.setenv("MAX_JOBS", "1")
    nvcc(cuda_home, compile=COMPILER.format(log=tmp_path / "nvcc-arguments"))
    log = tmp_path / "runs"
    monkeypatch.setenv("CXX", script(tmp_path / "c++", f"echo run >> {log}; echo 'x.cpp:3: error: no' >&2; exit 1"))
    assert builder.build(tmp_path / "build", tmp_path / "package").reason == "it did not compile: x.cpp:3: error: no"
    assert log.read_text() == "run\n"
    assert "WITHOUT its CUDA code" not in capfd.readouterr().err


@pytest.mark.parametrize(("version", "known"), [("12.4", False), ("12.8", True), ("13.0", True)])
def test_nvcc_gets_no_flag_that_it_does_not_know(tools, monkeypatch, tmp_path, cuda_home, compiler, version, known):
    """--compress-mode came with 12.8."""
    builder, _ = tools
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    arguments = tmp_path / "nvcc-arguments"
    nvcc(cuda_home, version, compile=COMPILER.format(log=arguments))
    assert builder.build(tmp_path / "build", tmp_path / "package").reason == f"C++ and CUDA {version}"
    assert ("--compress-mode=size" in arguments.read_text().splitlines()) == known


ODD = "a b $c:d"


def test_paths_with_blanks_reach_the_compilers_whole(tools, monkeypatch, tmp_path, cuda_home, compiler):
    builder, toolchain = tools
    odd = tmp_path / ODD
    root = fake_torch(odd / "torch", "2.13.0")
    monkeypatch.setattr(builder, "find_torch", lambda: toolchain.Torch(root, "2.13.0"))
    (odd / "cuda").parent.mkdir(exist_ok=True)
    cuda_home.rename(odd / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(odd / "cuda"))
    nvcc_log = tmp_path / "nvcc-arguments"
    nvcc(odd / "cuda", compile=COMPILER.format(log=nvcc_log))
    record = builder.build(odd / "build", odd / "package")
    assert record.reason == "C++ and CUDA 13.0", record

    include = str(root / "include")
    cxx, cuda = compiler.read_text().splitlines(), nvcc_log.read_text().splitlines()
    for arguments in (cxx, cuda):
        assert arguments[arguments.index("-isystem") + 1] == include
        assert '-DEMBEDKERNELS_ARCHITECTURES="sm_80,sm_90,sm_120,compute_120"' in arguments
    assert f"-ffile-prefix-map={include}=torch" in cxx
    assert f"-L{root / 'lib'}" in cxx
    assert f"-L{odd / 'cuda/lib64'}" in cxx
    # nvcc pastes these into a command line for the shell.
    passed_on = [flag.removeprefix("-Xcompiler=") for flag in cuda if flag.startswith("-Xcompiler=")]
    heard = subprocess.run(["sh", "-c", f"printf '%s\\n' {' '.join(passed_on)}"], capture_output=True, text=True)
    assert set(heard.stdout.splitlines()) == {"-fPIC", "-fvisibility=hidden", f"-ffile-prefix-map={include}=torch"}


def test_a_real_compiler_among_paths_with_blanks(tools, monkeypatch, tmp_path):
    """One file through ninja, the shell and the compiler, sources included."""
    builder, toolchain = tools
    odd = tmp_path / ODD
    odd.mkdir()
    (odd / "csrc").symlink_to(builder.SOURCES)
    torch = toolchain.find_torch()
    (odd / "torch").symlink_to(torch.root)
    monkeypatch.setattr(builder, "SOURCES", odd / "csrc")
    monkeypatch.setattr(builder, "CPU_SOURCES", ("checks.cpp",))
    monkeypatch.setattr(builder, "find_torch", lambda: toolchain.Torch(odd / "torch", torch.version))
    monkeypatch.setenv("EMBEDKERNELS_CUDA", "0")
    assert builder.build(tmp_path / "objects", odd / "package").built
    # Nothing to do the second time: the dependencies were read back.
    done = subprocess.run([toolchain.find_ninja(), "-C", str(tmp_path / "objects")], capture_output=True, text=True)
    assert "no work to do" in done.stdout, done.stdout
