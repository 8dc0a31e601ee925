"""Hardware: best policy, NVML readings through a fake NVML, and advice."""

import ctypes
import os
import sys
import types

import keras
import pynvml
import pytest

from keras_mixprec import activity
from keras_mixprec import hardware
from keras_mixprec import nvml
from keras_mixprec.tensor_cores import tensor_core_advice

MIB = 2**20


class FakeGpu:
    """A GPU or a MIG slice, with what NVML would answer about it."""

    def __init__(self, uuid, gpm=True, instance=None, slices=()):
        self.uuid, self.gpm, self.instance = uuid, gpm, instance
        self.slices, self.parent = slices, None
        self.percent = {1: 90.0, 5: 57.0, 7: 56.0}
        self.samples = [20, 40]
        self.energy = 1_000_000  # mJ
        self.processes = []
        for part in slices:
            part.parent = self


class FakeNvml(types.ModuleType):
    """The part of pynvml that is used, with pynvml's own structs and errors."""

    c_nvmlGpmMetricsGet_t = pynvml.c_nvmlGpmMetricsGet_t
    NVML_GPM_METRICS_GET_VERSION = pynvml.NVML_GPM_METRICS_GET_VERSION

    def __init__(self, *gpus):
        super().__init__("pynvml")
        self.gpus, self.alive, self.taken = gpus, {}, []
        self.started = 0

    def nvmlInit(self):
        self.started += 1

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self.gpus[index]

    def nvmlDeviceGetName(self, gpu):
        return "NVIDIA Fake"

    def nvmlDeviceGetUUID(self, gpu):
        return gpu.uuid

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu):
        return 7 if gpu.slices else 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu, index):
        if index >= len(gpu.slices):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return gpu.slices[index]

    def nvmlDeviceGetGpuInstanceId(self, gpu):
        return gpu.instance

    def nvmlDeviceGetComputeInstanceId(self, gpu):
        return 0

    def nvmlGpmQueryDeviceSupport(self, gpu):
        assert gpu.parent is None
        return types.SimpleNamespace(isSupportedDevice=int(gpu.gpm))

    def nvmlGpmSampleAlloc(self):
        address = 4096 + 16 * len(self.taken) + 16 * len(self.alive)
        self.alive[address] = None
        return ctypes.cast(address, pynvml.c_nvmlGpmSample_t)

    def nvmlGpmSampleGet(self, gpu, sample):
        assert not gpu.slices and gpu.parent is None
        self._take(gpu, sample)

    def nvmlGpmMigSampleGet(self, gpu, instance, sample):
        (part,) = [s for s in gpu.slices if s.instance == instance]
        self._take(part, sample)

    def _take(self, gpu, sample):
        self.alive[address_of(sample)] = gpu
        self.taken.append(gpu)

    def nvmlGpmSampleFree(self, sample):
        del self.alive[address_of(sample)]

    def nvmlGpmMetricsGet(self, request):
        assert request.version == 1
        first, last = (self.alive[address_of(s)] for s in samples_of(request))
        assert first is last
        for slot in request.metrics[: request.numMetrics]:
            known = slot.metricId in first.percent
            slot.nvmlReturn = 0 if known else pynvml.NVML_ERROR_NOT_SUPPORTED
            slot.value = first.percent.get(slot.metricId, 0.0)
        return request

    def nvmlDeviceGetSamples(self, gpu, kind, since):
        assert kind == pynvml.NVML_GPU_UTILIZATION_SAMPLES
        assert since == 1_000_000_000  # microseconds at the start
        if gpu.samples is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        samples = [pynvml.c_nvmlSample_t() for _ in gpu.samples]
        for sample, value in zip(samples, gpu.samples, strict=True):
            sample.sampleValue.uiVal = value
        return 1, samples  # NVML_VALUE_TYPE_UNSIGNED_INT

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return pynvml.c_nvmlUtilization_t(gpu=33, memory=5)

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        if gpu.energy is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return gpu.energy

    def nvmlDeviceGetPowerUsage(self, gpu):
        return 120_500  # mW

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return pynvml.c_nvmlMemory_t(total=800 * MIB, free=500 * MIB, used=300 * MIB)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        return [
            types.SimpleNamespace(pid=pid, usedGpuMemory=m) for pid, m in gpu.processes
        ]


def address_of(sample):
    return ctypes.cast(sample, ctypes.c_void_p).value


def samples_of(request):
    return request.sample1, request.sample2


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(seconds=1000.0)
    fake = types.SimpleNamespace(time=lambda: now.seconds)
    monkeypatch.setattr(activity, "time", fake)
    return now


@pytest.fixture
def install(monkeypatch, clock):
    """Return a function that puts a fake NVML and fake backend counters in place."""

    def clear():
        nvml.load.cache_clear()
        nvml.say_once.cache_clear()

    def install(library, peaks=(1,), visible=None):
        monkeypatch.setitem(sys.modules, "pynvml", library)
        counters = {f"gpu:{i}": (peak, peak) for i, peak in enumerate(peaks)}
        monkeypatch.setattr(hardware.engine, "memory_info", lambda: counters)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return library

    clear()
    yield install
    clear()


def one_epoch():
    return hardware.read_activity(hardware.start_activity(power=False))


def lines(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "keras_mixprec"]


# -- absent: no key, one line, no exception -----------------------------------------


def test_without_an_accelerator_nvml_is_not_asked(install, caplog):
    library = install(FakeNvml(FakeGpu("GPU-a")), peaks=())
    assert one_epoch() == {}
    assert library.started == 0 and lines(caplog) == []


def test_without_the_library(install, caplog):
    install(None)
    assert one_epoch() == {} and one_epoch() == {}
    (line,) = lines(caplog)
    assert "pip install keras_mixprec[gpu]" in line
    assert "gpu_util and tensor_core_util will not be logged" in line


def test_without_a_driver(install, caplog):
    library = FakeNvml()

    def no_driver():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    library.nvmlInit = no_driver
    install(library)
    assert one_epoch() == {} and one_epoch() == {}
    (line,) = lines(caplog)
    assert "NVML Shared Library Not Found" in line


def test_without_gpm_the_drivers_samples_are_averaged(install, caplog):
    install(FakeNvml(FakeGpu("GPU-a", gpm=False)))
    assert one_epoch() == {"gpu_util": 30.0}
    assert one_epoch() == {"gpu_util": 30.0}
    (line,) = lines(caplog)
    assert "no GPM counters for NVIDIA Fake: tensor_core_util" in line


@pytest.mark.parametrize("samples", [None, []])
def test_without_samples_the_present_utilisation_counts(install, samples):
    gpu = FakeGpu("GPU-a", gpm=False)
    gpu.samples = samples
    install(FakeNvml(gpu))
    assert one_epoch() == {"gpu_util": 33.0}


@pytest.mark.parametrize("error", [pynvml.NVMLError(999), AttributeError("old")])
@pytest.mark.parametrize(
    "function", sorted(n for n in vars(FakeNvml) if n.startswith("nvml"))
)
def test_no_function_that_fails_raises(install, function, error):
    def fails(*args):
        raise error

    part = FakeGpu("MIG-a", instance=1)
    for library in (
        FakeNvml(FakeGpu("GPU-a"), FakeGpu("GPU-b", gpm=False)),
        FakeNvml(FakeGpu("GPU-a", slices=[part])),
    ):
        setattr(library, function, fails)
        install(library, peaks=(1,) * len(library.gpus))
        logs = one_epoch()
        assert all(isinstance(v, float) for v in logs.values())


def test_gpm_that_is_supported_but_forbidden(install, caplog):
    library = install(FakeNvml(FakeGpu("GPU-a")))

    def forbidden(gpu, sample):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)

    library.nvmlGpmSampleGet = forbidden
    assert one_epoch() == {"gpu_util": 30.0}
    assert "Insufficient Permissions" in lines(caplog)[0]
    assert len(lines(caplog)) == 1 and library.alive == {}


# -- GPM ----------------------------------------------------------------------------


def test_one_device(install, caplog):
    library = install(FakeNvml(FakeGpu("GPU-a")))
    assert one_epoch() == {"gpu_util": 90.0, "tensor_core_util": 57.0}
    assert len(library.taken) == 2, "one sample at each end"
    assert library.alive == {}, "samples were not freed"
    assert lines(caplog) == []


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_metric_without_a_number_is_absent(install, value):
    gpu = FakeGpu("GPU-a")
    gpu.percent[5] = value
    gpu.percent = {k: v for k, v in gpu.percent.items() if v is not None}
    install(FakeNvml(gpu))
    assert one_epoch() == {"gpu_util": 90.0}


def test_several_devices(install):
    gpus = [FakeGpu("GPU-a"), FakeGpu("GPU-b"), FakeGpu("GPU-c", gpm=False)]
    gpus[1].percent = {1: 60.0, 5: 27.0}
    install(FakeNvml(*gpus), peaks=(5, 5, 5))
    assert one_epoch() == {
        "gpu_util": 60.0,
        "gpu_util_0": 90.0,
        "gpu_util_1": 60.0,
        "gpu_util_2": 30.0,
        "tensor_core_util": 42.0,
        "tensor_core_util_0": 57.0,
        "tensor_core_util_1": 27.0,
    }


def test_a_device_the_process_has_no_memory_on_does_not_count(install):
    gpus = [FakeGpu("GPU-a"), FakeGpu("GPU-b")]
    gpus[0].percent = {1: 0.0, 5: 0.0}
    install(FakeNvml(*gpus), peaks=(0, 5))
    assert one_epoch() == {"gpu_util": 90.0, "tensor_core_util": 57.0}


def test_only_visible_devices_count(install):
    gpus = [FakeGpu("GPU-a"), FakeGpu("GPU-b")]
    gpus[1].percent = {1: 12.0, 5: 3.0}
    library = install(FakeNvml(*gpus), visible="1")
    assert one_epoch() == {"gpu_util": 12.0, "tensor_core_util": 3.0}
    assert set(library.taken) == {gpus[1]}


# -- memory and power ---------------------------------------------------------------


def test_power_is_the_mean_over_the_epoch(install, clock):
    gpu = FakeGpu("GPU-a")
    install(FakeNvml(gpu))
    start = hardware.start_activity()
    clock.seconds += 10
    gpu.energy += 3_500_000
    assert hardware.read_devices(start)[0].power_w == 350.0


def test_power_without_an_energy_counter_or_time(install, clock):
    gpu = FakeGpu("GPU-a")
    install(FakeNvml(gpu))
    start = hardware.start_activity()
    assert hardware.read_devices(start)[0].power_w == 120.5
    clock.seconds += 10
    present = hardware.start_activity(power=False)
    clock.seconds += 10
    assert hardware.read_devices(present)[0].power_w == 120.5
    gpu.energy = None
    assert hardware.read_devices(start)[0].power_w == 120.5


def test_an_epoch_asks_the_driver_for_no_more_than_it_logs(install, monkeypatch):
    asked, real = [], activity.ask
    monkeypatch.setattr(
        activity,
        "ask",
        lambda library, name, *a: asked.append(name) or real(library, name, *a),
    )
    install(FakeNvml(FakeGpu("GPU-a")))
    assert one_epoch() == {"gpu_util": 90.0, "tensor_core_util": 57.0}
    assert "nvmlGpmMetricsGet" in asked
    slow = ("MemoryInfo", "ComputeRunningProcesses", "PowerUsage")
    slow += ("TotalEnergyConsumption",)
    assert not {f"nvmlDeviceGet{name}" for name in slow} & set(asked), asked


def test_memory_of_the_device_and_of_this_process(install):
    gpu = FakeGpu("GPU-a")
    gpu.processes = [(os.getpid(), 120 * MIB), (1, 99 * MIB)]
    install(FakeNvml(gpu))
    (reading,) = hardware.read_devices(hardware.start_activity())
    assert reading.memory_used_mb == 300
    assert reading.memory_total_mb == 800
    assert reading.memory_process_mb == 120
    assert reading.hmma_util == 56.0


def test_memory_of_a_process_that_nvml_does_not_know(install):
    gpu = FakeGpu("GPU-a")
    gpu.processes = [(1, 99 * MIB)]
    install(FakeNvml(gpu))
    (reading,) = hardware.read_devices(hardware.start_activity())
    assert reading.memory_process_mb is None


# -- which devices ------------------------------------------------------------------

SLICES = [FakeGpu("MIG-1111", instance=3), FakeGpu("MIG-2222", instance=5)]
MIG_GPU = FakeGpu("GPU-cc", slices=SLICES)
GPUS = [FakeGpu("GPU-aa1"), FakeGpu("GPU-aa2"), MIG_GPU]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["GPU-aa1", "GPU-aa2", "MIG-1111"]),
        ("", []),
        ("-1", []),
        ("1,0", ["GPU-aa2", "GPU-aa1"]),
        ("0,7,1", ["GPU-aa1"]),
        ("1,-1,0", ["GPU-aa2"]),
        (" 1 , 0 ", ["GPU-aa2", "GPU-aa1"]),
        ("GPU-aa2", ["GPU-aa2"]),
        ("GPU-aa", ["GPU-aa1"]),
        ("GPU-cc", ["MIG-1111"]),
        ("2", ["MIG-1111"]),
        ("MIG-2222", ["MIG-2222"]),
        ("MIG-GPU-cc/5/0", ["MIG-2222"]),
        ("MIG-GPU-cc/4/0", []),
        ("NoDevFiles", []),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(visible, expected):
    found = nvml.visible_devices(FakeNvml(*GPUS), visible)
    assert [device.handle.uuid for device in found] == expected


def test_a_mig_slice_is_sampled_by_its_instance(install):
    library = install(FakeNvml(*GPUS), visible="MIG-2222")
    SLICES[1].percent = {1: 44.0, 5: 22.0}
    assert one_epoch() == {"gpu_util": 44.0, "tensor_core_util": 22.0}
    assert set(library.taken) == {SLICES[1]} and library.alive == {}


# -- policy -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accelerator", "units", "policy"),
    [
        (("tpu", None), None, "mixed_bfloat16"),
        (("gpu", (9, 0)), None, "mixed_float16"),
        (("gpu", (7, 0)), None, "mixed_float16"),
        (("gpu", (6, 1)), None, "float32"),
        (None, "amx_bf16", "mixed_bfloat16"),
        (None, None, "float32"),
    ],
)
def test_best_policy(monkeypatch, accelerator, units, policy):
    monkeypatch.setattr(hardware.engine, "accelerator", lambda: accelerator)
    monkeypatch.setattr(hardware, "cpu_bfloat16_units", lambda: units)
    assert hardware.best_policy()[0] == policy


@pytest.mark.parametrize(
    ("flags", "units"),
    [
        ("flags : fpu avx512_bf16 amx_bf16", "amx_bf16"),
        ("Features : fp asimd bf16", "bf16"),
        ("flags : fpu avx512f", None),
    ],
)
def test_cpu_bfloat16_units(tmp_path, flags, units):
    path = tmp_path / "cpuinfo"
    path.write_text(flags)
    assert hardware.cpu_bfloat16_units(str(path)) == units
    assert hardware.cpu_bfloat16_units(str(tmp_path / "none")) is None


# -- advice -------------------------------------------------------------------------


def compiled(units=16, dtype="mixed_float16", jit_compile=True):
    model = keras.Sequential(
        [keras.Input((32,)), keras.layers.Dense(units, dtype=dtype, name="hidden")]
    )
    model.compile("sgd", "mse", jit_compile=jit_compile)
    return model


@pytest.mark.parametrize(
    ("arguments", "gpu_util", "expected"),
    [
        ({}, 12.0, "waits for input or for Python (gpu_util is 12%)"),
        ({"units": 30}, 95.0, "not multiples of 8, in 1 of 1 layers"),
        ({"jit_compile": False}, 95.0, "Compile with `jit_compile=True`"),
        ({}, None, "element-wise work outweighs"),
    ],
)
def test_advice_names_the_likely_reason(arguments, gpu_util, expected):
    logs = {"tensor_core_util": 0.4, "gpu_util": gpu_util}
    advice = tensor_core_advice(compiled(**arguments), logs)
    assert "busy 0.4% of an epoch" in advice
    assert expected in advice


def test_advice_when_no_kernel_is_half():
    model = keras.Sequential(
        [
            keras.Input((32,)),
            keras.layers.ReLU(dtype="mixed_float16"),
            keras.layers.Dense(7, dtype="float32"),
        ]
    )
    model.compile("sgd", "mse")
    advice = tensor_core_advice(model, {"tensor_core_util": 0.0, "gpu_util": 99.0})
    assert "no layer with a kernel computes in half precision" in advice


@pytest.mark.parametrize(
    ("dtype", "logs"),
    [
        ("mixed_float16", {"tensor_core_util": 57.0}),
        ("mixed_float16", {"gpu_util": 1.0}),
        ("float32", {"tensor_core_util": 0.0}),
    ],
)
def test_no_advice_without_need(dtype, logs):
    assert tensor_core_advice(compiled(dtype=dtype), logs) is None
