// Streams, events, capture and graphs. A stream holds no queue: work is done at the call, or recorded by a capture.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "driver.h"

namespace {

using Clock = std::chrono::steady_clock;

struct Stream;

struct Node {
    NodeType type;
    std::function<CUresult()> work;
};

/// Nodes in the order in which they were recorded, which every order of execution that CUDA may choose agrees with.
struct Graph {
    std::vector<std::unique_ptr<Node>> nodes;
};

enum class Mode : int {
    Global = 0,
    ThreadLocal = 1,
    Relaxed = 2
};

struct Capture {
    Stream* origin;
    Mode mode;
    std::thread::id thread;
    uint64_t id;
    Graph* graph;
    bool valid = true;
    /// Streams that joined by waiting for an event, and have done work that nobody of the capture waited for since.
    std::vector<Stream*> members = {}, unjoined = {};
};

struct Stream {
    bool blocking, legacy;
    Capture* capture = nullptr;
};

struct Event {
    bool timed;
    bool recorded = false;
    Clock::time_point time = {};
    /// Where it was last recorded, if that was in a capture.
    uint64_t capture_id = 0;
    Stream* stream = nullptr;
};

Handles<Stream> streams;
Handles<Event> events;
Handles<Graph> graphs;
Handles<Graph> executables;
std::vector<std::unique_ptr<Capture>> captures;
uint64_t capture_count = 0;
Stream legacy_stream = {true, true}, per_thread_stream = {true, false};

Stream* find_stream(CUstream handle) {
    const auto number = reinterpret_cast<uintptr_t>(handle);
    if (number <= 1) return &legacy_stream;
    if (number == 2) return &per_thread_stream;
    return streams.find(handle);
}

Capture* find_capture(uint64_t id) {
    for (const auto& capture : captures)
        if (capture->id == id) return capture.get();
    return nullptr;
}

CUresult invalidate(Capture& capture, CUresult error) {
    capture.valid = false;
    return error;
}

bool is_fault(CUresult error) { return error >= CUDA_ERROR_ILLEGAL_ADDRESS && error <= CUDA_ERROR_LAUNCH_FAILED; }

CUresult finish(CUresult error) {
    static const bool blocking = [] {
        const char* value = std::getenv("CUDA_LAUNCH_BLOCKING");
        return value != nullptr && *value == '1';
    }();
    if (!is_fault(error)) return error;
    set_fault(error);
    return blocking ? error : CUDA_SUCCESS;
}

CUresult record(Capture& capture, Stream* stream, NodeType type, std::function<CUresult()> work) {
    if (!capture.valid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    capture.graph->nodes.push_back(std::make_unique<Node>(type, std::move(work)));
    if (stream != capture.origin && std::ranges::find(capture.unjoined, stream) == capture.unjoined.end())
        capture.unjoined.push_back(stream);
    return CUDA_SUCCESS;
}

} // namespace

bool is_capturing(CUstream handle) {
    const Stream* stream = find_stream(handle);
    return stream != nullptr && stream->capture != nullptr;
}

CUresult invalidate_capture(CUstream stream) {
    return invalidate(*find_stream(stream)->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

CUresult forbid_during_capture() {
    for (const auto& capture : captures) {
        const bool here = capture->thread == std::this_thread::get_id();
        if (capture->mode == Mode::Global || (capture->mode == Mode::ThreadLocal && here))
            return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    return CUDA_SUCCESS;
}

CUresult enqueue(CUstream handle, NodeType type, std::function<CUresult()> work) {
    std::lock_guard entered(driver_lock());
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capture != nullptr) return record(*stream->capture, stream, type, std::move(work));
    if (stream->legacy)
        for (const auto& capture : captures)
            if (capture->origin->blocking) return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    return finish(work());
}

// Streams.

API cuStreamCreate(Stream** stream, unsigned flags) {
    ENTER;
    *stream = streams.create((flags & 1) == 0, false);
    return CUDA_SUCCESS;
}
API cuStreamCreateWithPriority(Stream** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
API cuStreamDestroy_v2(Stream* stream) {
    ENTER;
    if (stream != nullptr && is_capturing(stream))
        return invalidate(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    return streams.destroy(stream);
}
API cuStreamSynchronize(CUstream handle) {
    ENTER;
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->capture != nullptr) return invalidate(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    return forbid_during_capture();
}
API cuStreamQuery(CUstream stream) { return cuStreamSynchronize(stream); }

/// A stream that waits for an event of a capture becomes part of it; one of a capture may not wait for anything else.
API cuStreamWaitEvent(CUstream handle, Event* event, unsigned) {
    ENTER;
    Stream* stream = find_stream(handle);
    if (stream == nullptr || events.find(event) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    Capture* theirs = find_capture(event->capture_id);
    if (theirs == nullptr) {
        const bool isolated = stream->capture != nullptr;
        return isolated ? invalidate(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_ISOLATION) : CUDA_SUCCESS;
    }
    if (stream->capture == nullptr) {
        if (stream->legacy) return invalidate(*theirs, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
        stream->capture = theirs;
        theirs->members.push_back(stream);
        theirs->unjoined.push_back(stream);
    } else if (stream->capture != theirs) {
        invalidate(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_MERGE);
        return invalidate(*theirs, CUDA_ERROR_STREAM_CAPTURE_MERGE);
    }
    if (stream != event->stream) std::erase(theirs->unjoined, event->stream);
    return CUDA_SUCCESS;
}

// Capture.

API cuStreamBeginCapture_v2(CUstream handle, Mode mode) {
    ENTER;
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (stream->legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream->capture != nullptr) return CUDA_ERROR_INVALID_VALUE;
    captures.push_back(
        std::make_unique<Capture>(stream, mode, std::this_thread::get_id(), ++capture_count, graphs.create()));
    stream->capture = captures.back().get();
    return CUDA_SUCCESS;
}
API cuStreamEndCapture(CUstream handle, Graph** graph) {
    ENTER;
    *graph = nullptr;
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    Capture* capture = stream->capture;
    if (capture == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (capture->origin != stream) return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
    CUresult error = CUDA_SUCCESS;
    if (!capture->unjoined.empty()) error = CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    if (!capture->valid) error = CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (error == CUDA_SUCCESS)
        *graph = capture->graph;
    else
        graphs.destroy(capture->graph);
    stream->capture = nullptr;
    for (Stream* member : capture->members) member->capture = nullptr;
    std::erase_if(captures, [capture](const auto& other) { return other.get() == capture; });
    return error;
}
API cuStreamIsCapturing(CUstream handle, int* status) {
    ENTER;
    const Stream* stream = find_stream(handle);
    if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    *status = stream->capture == nullptr ? 0 : stream->capture->valid ? 1 : 2;
    return CUDA_SUCCESS;
}
API cuStreamGetCaptureInfo_v3(CUstream handle, int* status, uint64_t* id, Graph** graph, const void*** dependencies,
                              const void** edges, size_t* dependency_count) {
    TRY(cuStreamIsCapturing(handle, status));
    const Capture* capture = find_stream(handle)->capture;
    if (id != nullptr) *id = capture == nullptr ? 0 : capture->id;
    if (graph != nullptr) *graph = capture == nullptr ? nullptr : capture->graph;
    if (dependencies != nullptr) *dependencies = nullptr;
    if (edges != nullptr) *edges = nullptr;
    if (dependency_count != nullptr) *dependency_count = 0;
    return CUDA_SUCCESS;
}

// Events. Times are those of the CPU.

API cuEventCreate(Event** event, unsigned flags) {
    ENTER;
    *event = events.create((flags & 2) == 0);
    return CUDA_SUCCESS;
}
API cuEventDestroy_v2(Event* event) {
    ENTER;
    return events.destroy(event);
}
/// In a capture an event marks a dependency, unless it is to be recorded by the graph itself (flag EXTERNAL).
API cuEventRecordWithFlags(Event* event, CUstream handle, unsigned flags) {
    ENTER;
    Stream* stream = find_stream(handle);
    if (stream == nullptr || events.find(event) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    const auto mark = [event] {
        if (events.find(event) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
        event->recorded = true;
        event->time = Clock::now();
        return CUDA_SUCCESS;
    };
    if ((flags & 1) != 0) return enqueue(handle, NodeType::EventRecord, mark);
    event->stream = stream;
    event->capture_id = stream->capture == nullptr ? 0 : stream->capture->id;
    return stream->capture == nullptr ? mark() : CUDA_SUCCESS;
}
API cuEventRecord(Event* event, CUstream stream) { return cuEventRecordWithFlags(event, stream, 0); }
API cuEventSynchronize(Event* event) {
    ENTER;
    if (events.find(event) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (Capture* capture = find_capture(event->capture_id)) return invalidate(*capture, CUDA_ERROR_CAPTURED_EVENT);
    return forbid_during_capture();
}
API cuEventQuery(Event* event) { return cuEventSynchronize(event); }
API cuEventElapsedTime(float* milliseconds, Event* start, Event* end) {
    ENTER;
    if (events.find(start) == nullptr || events.find(end) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (!start->timed || !end->timed || !start->recorded || !end->recorded) return CUDA_ERROR_INVALID_HANDLE;
    *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
    return CUDA_SUCCESS;
}

#if CUDA_EMULATOR_NEWEST >= 1208
API cuEventElapsedTime_v2(float* milliseconds, Event* start, Event* end) {
    return cuEventElapsedTime(milliseconds, start, end);
}
#endif

// Graphs.

API cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long) {
    ENTER;
    if (graphs.find(graph) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    *executable = executables.create();
    for (const auto& node : graph->nodes) (*executable)->nodes.push_back(std::make_unique<Node>(*node));
    return CUDA_SUCCESS;
}
API cuGraphLaunch(Graph* executable, CUstream stream) {
    ENTER;
    if (executables.find(executable) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (is_capturing(stream)) return CUDA_ERROR_NOT_SUPPORTED;
    for (const auto& node : executable->nodes)
        if (const CUresult error = node->work(); error != CUDA_SUCCESS) return finish(error);
    return CUDA_SUCCESS;
}
API cuGraphUpload(Graph* executable, CUstream) {
    ENTER;
    return executables.find(executable) == nullptr ? CUDA_ERROR_INVALID_HANDLE : CUDA_SUCCESS;
}
API cuGraphExecDestroy(Graph* executable) {
    ENTER;
    return executables.destroy(executable);
}
API cuGraphDestroy(Graph* graph) {
    ENTER;
    return graphs.destroy(graph);
}
API cuGraphGetNodes(Graph* graph, Node** nodes, size_t* count) {
    ENTER;
    if (graphs.find(graph) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    for (size_t i = 0; nodes != nullptr && i < *count; i++)
        nodes[i] = i < graph->nodes.size() ? graph->nodes[i].get() : nullptr;
    *count = graph->nodes.size();
    return CUDA_SUCCESS;
}
API cuGraphNodeGetType(Node* node, NodeType* type) {
    *type = node->type;
    return CUDA_SUCCESS;
}
